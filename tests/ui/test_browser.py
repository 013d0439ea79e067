"""The pages in a real browser: live, by keyboard, dark, on a phone, without a script, and with what is hostile in every field."""

import re
import sys
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.acceptance.stack import Stack
from tests.ui.conftest import Open

pytestmark = pytest.mark.slow

PHONE = {"width": 390, "height": 844}
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{7*7}}'\"`\u202e"
FILES = ("a.md", "b.csv", "c.json", "d.diff", "e.svg", "f.html")
PLACES = (
    "/",
    "/ui/tasks",
    "/ui/tasks?view=board",
    "/ui/new?type=command",
    "/ui/handlers",
    "/ui/fleet",
    "/ui/settings",
    "/ui/keys",
    "/ui/audit",
    "/login",
)


@pytest.fixture(scope="module")
def hostile(stack: Stack) -> str:
    """A task that has what is hostile wherever a task can have text."""
    code = f"import sys; t=sys.argv[1]; print(t); print('\\x1b]0;owned\\x07\\x1b[31mred'+t); [open(n, 'w').write(t) for n in {FILES}]"
    task_id = stack.enqueue(
        "command",
        {"argv": [sys.executable, "-c", code, HOSTILE], "artifacts": ["*"], "env": {"X": HOSTILE}},
        title=HOSTILE[:190],
        labels={"team": HOSTILE},
        requested_by=HOSTILE[:190],
        concurrency_key=HOSTILE,
    )
    stack.enqueue("command", {"argv": [HOSTILE]}, title="what fails")
    stack.client.post("/keys/x/pause", params={"reason": HOSTILE[:190]})
    stack.wait(task_id)
    return task_id


def _fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(stack: Stack, visit: Open, hostile: str, theme: str) -> None:
    """No violation that axe finds, nothing beyond the edge, and nothing that a task wrote is run; in the dark, colours are what differs."""
    task = f"/ui/tasks/{hostile}"
    files = [f"{task}/files/artifacts/{name}" for name in FILES]
    places = (
        *PLACES,
        task,
        f"{task}/log",
        f"{task}/log?find=red",
        f"/ui/new?from={hostile}",
        f"/ui/tasks?text={'x' * 50}",
        *files,
        "/ui/tasks/nothing",
    )
    page = visit("/", must_be_clean=False, color_scheme=theme, viewport={"width": 1280, "height": 900})
    for place in places:
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(place)
        found = Axe().run(page, options=None if theme == "light" else {"runOnly": ["color-contrast"]})
        assert found.violations_count == 0, f"{place}: {found.generate_report()}"
        assert page.title() != "owned", place
        assert _fits(page), place
        page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        assert _fits(page), f"{place} on a phone"


def test_a_page_keeps_itself_up_to_date(stack: Stack, visit: Open) -> None:
    """Two tabs see a task come, run and end, without being loaded again; what is ticked stays so."""
    first, second = visit("/"), visit("/ui/tasks")
    for page in (first, second):
        expect(page.locator("html[data-connected=yes]")).to_have_count(1)
        page.evaluate("window.isTheSame = true")
    task_id = stack.enqueue("sleep", {"seconds": 3}, title="A live one")
    second.locator(f"input[value='{task_id}']").check()
    row = second.locator(f"#row-{task_id}")
    expect(row).to_contain_text("running")
    expect(first.locator("[data-part=live_d_running]")).to_contain_text("A live one")
    expect(row).to_contain_text("succeeded")
    expect(first.locator("[data-part=live_f_ended]")).to_contain_text("A live one")
    expect(second.locator(f"input[value='{task_id}']")).to_be_checked()
    assert first.evaluate("window.isTheSame") and second.evaluate("window.isTheSame")


def test_a_task_is_made_followed_stopped_and_run_again(stack: Stack, visit: Open, folder: Path) -> None:
    """The whole way by its buttons."""
    page = visit("/ui/new?type=command")
    page.get_by_label("Title").fill("By hand")
    page.locator("[name='payload.argv']").fill(
        f"{sys.executable}\n-uc\nimport time\nprint('up')\ntime.sleep(300)".replace("\nprint", ";print").replace("\ntime", ";time")
    )
    expect(page.locator("#curl")).to_contain_text('"title":"By hand"')
    page.get_by_role("button", name="Enqueue").click()
    page.wait_for_url("**/ui/tasks/*")
    task_id = page.url.rsplit("/", 1)[-1]
    expect(page.locator("[data-status=running]")).to_be_visible()
    expect(page.get_by_role("region", name="The end of the log")).to_contain_text("up")
    page.get_by_role("button", name="Stop it").click()
    expect(page.locator("[data-status=cancelled]")).to_be_visible()
    page.get_by_role("link", name="Edit and run again").click()
    expect(page.get_by_label("Title")).to_have_value("By hand")
    page.locator("[name='payload.argv']").fill("true")
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("[data-status=succeeded]")).to_be_visible()
    assert task_id not in page.url
    page.get_by_role("button", name="Run again").click()
    expect(page.locator("[data-status=succeeded]")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the trace").click()
    assert download.value.suggested_filename.endswith(".tar")


def test_many_are_picked_counted_and_changed(stack: Stack, visit: Open) -> None:
    """And nothing happens before the count is confirmed."""
    ids = [stack.enqueue("sleep", {"seconds": 300}, labels={"group": "many"}) for _ in range(3)]
    page = visit("/ui/tasks?label=group:many")
    page.locator("[data-pick-all]").check()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Cancel 3 tasks?")
    assert all(stack.task(task_id)["cancel_requested_at"] is None for task_id in ids)
    page.get_by_role("button", name="Cancel 3").click()
    expect(page.get_by_role("status").first).to_contain_text("3")
    for task_id in ids:
        stack.wait(task_id, lambda task: task["status"] == "cancelled")
    page.goto("/ui/tasks?label=group:many&status=cancelled")
    page.get_by_label("all that fit the filter").check()
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("button", name="Retry 3").click()
    expect(page.get_by_role("status").first).to_contain_text("3")
    stack.client.post("/tasks/cancel", json={"filter": {"label": ["group:many"]}})


def test_a_restart_of_the_server_is_outlived(stack: Stack, visit: Open) -> None:
    """The page says that nobody answers, comes back by itself, and shows what happened meanwhile."""
    page = visit("/", must_be_clean=False)
    expect(page.locator("html[data-connected=yes]")).to_have_count(1)
    page.evaluate("window.isTheSame = true")
    stack.processes[-1].close()
    expect(page.get_by_text("The tower does not answer")).to_be_visible()
    stack.server()
    stack.enqueue("echo", {}, title="Meanwhile")
    expect(page.locator("[data-part=live_f_ended]")).to_contain_text("Meanwhile")
    expect(page.locator("html[data-connected=yes]")).to_have_count(1)
    assert page.evaluate("window.isTheSame")


def test_the_keyboard_reaches_everything(stack: Stack, visit: Open) -> None:
    """Shortcuts, the palette, and the list by j, k, x and o."""
    ids = [stack.enqueue("echo", {"n": number}, title=f"Key {number}") for number in range(2)]
    stack.wait(ids[-1])
    page = visit("/")
    page.keyboard.press("g")
    page.keyboard.press("t")
    page.wait_for_url("**/ui/tasks")
    page.keyboard.press("/")
    expect(page.locator("[data-search]")).to_be_focused()
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    page.keyboard.press("x")
    expect(page.locator("input[name=id]").first).to_be_checked()
    page.keyboard.press("o")
    page.wait_for_url(f"**/ui/tasks/{ids[-1]}")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+k")
    page.keyboard.type("Key 0")
    expect(page.get_by_role("dialog")).to_contain_text("Key 0 · succeeded")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/ui/tasks/{ids[0]}")


def test_focus_stays_when_what_stood_before_is_gone(stack: Stack, visit: Open) -> None:
    """Rows that leave the list do not move those that stay."""
    ids = [stack.enqueue("echo", {"n": number}, not_before="2500-01-01T00:00:00Z") for number in range(3)]
    page = visit("/ui/tasks?status=queued")
    expect(page.locator("html[data-connected=yes]")).to_have_count(1)
    page.locator(f"#row-{ids[0]} a[data-open]").focus()
    stack.client.post(f"/tasks/{ids[2]}/cancel")
    expect(page.locator(f"#row-{ids[2]}")).to_have_count(0)
    assert page.evaluate("document.activeElement.getAttribute('href')") == f"/ui/tasks/{ids[0]}"
    for task_id in ids[:2]:
        stack.client.post(f"/tasks/{task_id}/cancel")


def test_the_palette_does_what_is_typed_however_fast(visit: Open) -> None:
    """Enter right after the last letter, and on a link that Tab has reached."""
    page = visit("/")
    page.keyboard.press("Control+k")
    page.get_by_role("dialog").get_by_role("searchbox").evaluate(
        "(input) => { input.value = 'fleet'; input.dispatchEvent(new Event('input')); }"
    )
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/fleet")
    page.keyboard.press("Control+k")
    page.get_by_role("dialog").get_by_role("link", name="Tasks").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/ui/tasks")


def test_without_a_script_everything_reads_and_every_form_works(stack: Stack, visit: Open) -> None:
    """Lists, logs and actions are plain pages and forms."""
    page = visit("/", java_script_enabled=False)
    page.get_by_role("link", name="New task").click()
    page.get_by_role("link", name="sleep").click()
    page.locator("[name='payload.seconds']").fill("300")
    page.get_by_role("button", name="Enqueue").click()
    page.get_by_role("button", name="Cancel").or_(page.get_by_role("button", name="Stop it")).click()
    task_id = page.url.rsplit("/", 1)[-1]
    stack.wait(task_id, lambda task: task["status"] == "cancelled")
    page.reload()
    expect(page.locator("[data-status=cancelled]")).to_be_visible()
    page.get_by_role("link", name="Whole log").click()
    expect(page.get_by_role("log")).to_contain_text("queued")
    page.goto("/ui/tasks?status=cancelled")
    page.get_by_label("Save this view as").fill("What was stopped")
    page.get_by_role("button", name="Save").click()
    page.goto("/ui/tasks")
    page.get_by_role("link", name="What was stopped").click()
    expect(page.get_by_label("cancelled")).to_be_checked()
    page.get_by_role("button", name="forget this view").click()
    expect(page.get_by_role("link", name="What was stopped")).to_have_count(0)
    page.get_by_role("button", name="dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_a_log_of_many_lines_shows_only_some_and_goes_anywhere(stack: Stack, visit: Open) -> None:
    """The end first; earlier lines come as they are scrolled to; a search leads to a line; what runs is followed."""
    code = """
import sys, time
for n in range(20000): print('row', n)
for n in range(100): time.sleep(.3); print('later', n, flush=True)
"""
    task_id = stack.enqueue("command", {"argv": [sys.executable, "-c", code]})
    page = visit(f"/ui/tasks/{task_id}/log")
    log = page.get_by_role("log")
    expect(log).to_contain_text("later 3", timeout=20_000)  # it comes a second after twenty thousand others
    log.evaluate("log => { log.scrollTop = 0; }")
    expect(page.locator("[data-follow]")).to_have_attribute("aria-pressed", "false")
    page.goto(f"/ui/tasks/{task_id}/log?find=row+12345")
    page.locator(".hits a.number").first.click()
    expect(page.locator(".line.marked")).to_contain_text("row 12345")
    first = int(log.get_attribute("data-first") or 0)
    log.evaluate("log => { log.scrollTop = 0; log.dispatchEvent(new Event('scroll')); }")
    expect(page.locator(f"#L{first - 1}")).to_have_count(1)
    assert page.locator(".line").count() <= 2400
    stack.client.post(f"/tasks/{task_id}/cancel")


def test_a_key_is_made_used_to_log_in_and_revoked(stack: Stack, visit: Open) -> None:
    """Each role is offered what it may do; a session ends with its key."""
    admin = visit("/ui/keys")
    admin.get_by_label("Whose it is").fill("vera")
    admin.get_by_label("Role").select_option("viewer")
    admin.get_by_role("button", name="Make it").click()
    key = admin.locator("#made").inner_text()
    viewer = visit("/login?next=/ui/tasks%3Fview%3Dboard", must_be_clean=False)
    viewer.get_by_label("Your key").fill(key)
    viewer.get_by_role("button", name="Log in").click()
    viewer.wait_for_url("**/ui/tasks?view=board")
    expect(viewer.locator("footer")).to_contain_text("vera")
    for name in ("New task", "Settings", "Keys", "Audit"):
        expect(viewer.get_by_role("navigation", name="Pages").get_by_role("link", name=name)).to_have_count(0)
    assert viewer.goto("/ui/keys").status == 403  # type: ignore[union-attr]
    task_id = stack.enqueue("command", {"argv": ["sleep", "300"]})
    stack.wait(task_id, lambda task: task["status"] == "running")
    log = viewer.context.new_page()
    log.goto(f"/ui/tasks/{task_id}/log")
    viewer.goto("/")
    expect(viewer.locator("html[data-connected=yes]")).to_have_count(1)
    admin.on("dialog", lambda dialog: dialog.accept())
    admin.get_by_role("button", name="Revoke vera").click()
    expect(admin.locator("tr.over")).to_contain_text("vera")
    viewer.wait_for_url("**/login?**")
    log.wait_for_url("**/login?**")
    stack.client.post(f"/tasks/{task_id}/cancel")
    admin.goto("/ui/audit")
    expect(admin.locator("main")).to_contain_text("revoke key")


def test_an_empty_tower_teaches(tmp_path: Path, browser: object, visit: Open) -> None:
    """It shows the request, and a button makes the first task."""
    empty = Stack(tmp_path)
    try:
        empty.server()
        page = visit("/", must_be_clean=False)  # it is still open when this tower ends
        page.goto(f"http://127.0.0.1:{empty.port}/")
        expect(page.get_by_text("Nothing has been asked for yet")).to_be_visible()
        page.get_by_role("button", name="Run a first task").click()
        expect(page.locator("[data-status=succeeded]")).to_be_visible()
    finally:
        empty.close()


def test_the_api_is_shown_and_can_be_tried_without_anything_from_elsewhere(visit: Open) -> None:
    """The page's policy lets no other host in, and a breach of it is an error of the page."""
    page = visit("/docs")
    page.locator("#operations-tasks-enqueue_tasks_enqueue_post").get_by_role("button").first.click()
    page.get_by_role("button", name="Try it out").click()
    page.locator("textarea.body-param__text").fill('{"type": "echo", "payload": {"from": "the reference"}}')
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table").get_by_text("task_id").first).to_be_visible()


def test_two_sessions_of_one_key_have_forms_of_their_own(stack: Stack, visit: Open) -> None:
    """Also where a part of the page came anew while both looked at the same."""
    key = stack.client.post("/access/keys", json={"name": "otto", "role": "operator"}).json()["key"]
    task_id = stack.enqueue("sleep", {"seconds": 300})
    pages = []
    for _ in range(2):
        page = visit(f"/login?next=/ui/tasks/{task_id}")
        page.get_by_label("Your key").fill(key)
        page.get_by_role("button", name="Log in").click()
        expect(page.locator("html[data-connected=yes]")).to_have_count(1)
        pages.append(page)
    stack.client.post(f"/tasks/{task_id}/cancel")
    pages[1].get_by_role("button", name="Retry", exact=True).click()
    expect(pages[1]).not_to_have_url(re.compile(task_id))
    expect(pages[1].get_by_role("main")).to_contain_text("sleep")
    stack.client.post(f"/tasks/{pages[1].url.rsplit('/', 1)[-1]}/cancel")
