"""What the pages tell: lists by any filter, views, pace, and tasks in words."""

import asyncio
import json
import re
import time

import pytest
from fastapi.testclient import TestClient

from tests import rows as r
from tests.ui.pages import SAME, ended, log_in
from tower import db, leases, lifecycle, overview, queries, views
from tower.errors import InvalidTask
from tower.keys import ANONYMOUS, Caller
from tower.lifecycle import Outcome
from tower.models import SavedView, Task, new_id
from tower.queries import Filter
from tower.settings import Settings
from tower.terms import ADMIN, OPERATOR, VIEWER
from tower.ui.charts import phases
from tower.ui.live import Live


def test_the_filter_is_the_address(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By status, type, label, text, time and worker; a search goes only so far at once, and says how to go on."""
    first = r.insert(title="the first of all", labels={"team": "a"})
    later = [r.insert(title=f"later {number}") for number in range(5)]
    log_in(client, VIEWER)
    for query, titles in (
        ("status=queued&label=team:a", {"the first of all"}),
        ("text=LATER+3", {"later 3"}),
        (
            "text=" + first[:20],
            {"the first of all"} | {f"later {number}" for number in range(5)} if first[:20] == later[0][:20] else {"the first of all"},
        ),
        ("status=failed", set()),
        ("worker=nobody", set()),
        ("after=2020-01-01T00:00&before=2020-02-01", set()),
        ("type=echo&after=2020-01-01", {"the first of all"} | {f"later {number}" for number in range(5)}),
    ):
        text = client.get(f"/ui/tasks?{query}").text
        assert {title for title in ("the first of all", *(f"later {number}" for number in range(5))) if f">{title}<" in text} == titles, (
            query
        )
    for query in ("status=lost", "label=nothing", "after=soon"):
        assert client.get(f"/ui/tasks?{query}").status_code == 422
    monkeypatch.setattr("tower.ui.facts._SEARCHED", 3)
    text = client.get("/ui/tasks?text=first+of").text
    assert "The 3 newest were searched" in text
    place = re.search(r'rel="next" href="([^"]*)"', text)
    assert place and ">the first of all<" in client.get(place[1].replace("&amp;", "&")).text


@pytest.mark.parametrize("clock", [0, -80_000, 80_000])
def test_a_time_finds_what_it_says_whatever_the_clock_that_made_the_id(rows: Settings, monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    """To the millisecond, and for times that no task can have."""
    made = time.time_ns() + clock * 1_000_000_000
    with monkeypatch.context() as patch:
        patch.setattr("tower.models.time.time_ns", lambda: made)
        task_id = new_id()
    at = r.row(r.insert(id=task_id))["created_at"]

    def found(**asked: float) -> list[str]:
        return [row["id"] for row in db.read(lambda: queries.tasks(Filter(**asked), before=None, limit=10))]  # type: ignore[arg-type]

    assert found(created_after=at) == found(created_before=at + 0.001) == found(created_after=-1e17, created_before=1e17) == [task_id]
    assert found(created_after=at + 0.001) == found(created_before=at) == found(created_after=1e17) == found(created_before=-1e17) == []


@pytest.mark.usefixtures("rows")
def test_a_text_finds_titles_types_and_beginnings_of_ids() -> None:
    """Whatever their case; what could be a pattern is a letter."""
    one, two = r.insert(type="run_tests.v2-x", title="Größer: 100%_"), r.insert(type="echo", title="tests")

    def found(text: str) -> list[str]:
        return [row["id"] for row in db.read(lambda: queries.tasks(Filter(text=text), before=None, limit=10))]

    assert found("TESTS") == [two, one]
    assert [found(text) for text in ("_tests.", "S.V2-X", "0%_", "größer:", one.upper(), one[:35])] == [[one]] * 6
    assert [found(text) for text in ("runttests", "_", "%", "t%s", "echo ", one[1:], f"{one}0")] == [[], [one], [one], [], [], [], []]


def test_views_belong_to_a_key(client: TestClient) -> None:
    """And there are only so many."""
    token = log_in(client, VIEWER)
    sent = {"csrf_token": token, "name": "mine", "filters": "status=failed"}
    assert client.post("/ui/views", data=sent, headers=SAME).headers["location"] == "/ui/tasks?status=failed"
    client.post("/ui/views", data={**sent, "filters": "status=queued"}, headers=SAME)
    assert 'href="/ui/tasks?status=queued">mine' in client.get("/ui/tasks").text
    log_in(client, ADMIN)
    assert ">mine<" not in client.get("/ui/tasks").text
    me = Caller(ANONYMOUS, VIEWER)
    for number in range(50):
        db.unit(lambda number=number: views.save(me, str(number), ""))  # type: ignore[misc]
    with pytest.raises(InvalidTask, match="50 views already"):
        db.unit(lambda: views.save(me, "one more", ""))
    assert db.read(lambda: SavedView.select().where(SavedView.owner == ANONYMOUS).count()) == 50


def test_the_pace_counts_every_end_once(rows: Settings) -> None:
    """Also when most of it was counted before."""
    pace, now = overview.Pace(), db.read(db.clock)
    for number in range(12):
        task_id = ended("failed" if number % 3 == 0 else "succeeded", labels={"team": "a", "odd": str(number % 2)})
        at = now - 200 * number
        db.unit(
            lambda task_id=task_id, at=at: (
                Task.update(finished_at=at, queued_at=at - 5, started_at=at - 3).where(Task.id == task_id).execute()
            )
        )  # type: ignore[misc]
    for _ in range(2):
        for found, length in zip(db.read(lambda: pace.read(Filter(), now)), (60, 48), strict=True):
            assert (sum(bucket.succeeded for bucket in found), sum(bucket.broken for bucket in found)) == (8, 4)
            assert {round(bucket.waited_s, 3) for bucket in found} == {0, 2.0}
            assert len(found) == length
    for labels, count in (((("team", "a"),), 12), ((("team", "a"), ("odd", "1")), 6), ((("team", "b"),), 0)):
        for found in db.read(lambda labels=labels: overview.Pace().read(Filter(within_labels=labels), now)):  # type: ignore[misc]
            assert sum(bucket.ended for bucket in found) == count
            assert {round(bucket.waited_s, 3) for bucket in found} == ({0, 2.0} if count else {0})
    late = ended()
    assert late
    assert [sum(bucket.succeeded for bucket in found) for found in db.read(lambda: pace.read(Filter(), db.clock()))] == [9, 9]
    narrowed = db.read(lambda: overview.Pace().read(Filter(within_types=("sleep",)), now))
    assert [sum(bucket.ended for bucket in found) for found in narrowed] == [0, 0]


def test_what_turns_text_around_is_seen_and_kept(client: TestClient) -> None:
    """In titles, labels and values; a form and a request mean exactly what the task had."""
    token = log_in(client, OPERATOR)
    task_id = r.insert(title="a\u202eb", payload='{"c": "d\u202ee"}', labels={"f": "g\u202eh"})
    for place in ("/", "/ui/tasks", "/ui/tasks?view=board", f"/ui/tasks/{task_id}"):
        page = client.get(place).text
        assert "a\ufffdb" in page and "\u202e" not in page, place
    assert "d\\u202ee" in client.get(f"/ui/tasks/{task_id}").text
    form = client.get(f"/ui/new?from={task_id}").text
    assert 'value="a\u202eb"' in form and "d\\u202ee" in form and "f:g\u202eh</textarea>" in form
    sent = {"csrf_token": token, "type": "echo", "title": "a\u202eb", "payload": '{"c": "d\\u202ee"}', "labels": "f:g\u202eh"}
    made = client.post("/ui/new", data=sent, headers=SAME).headers["location"].rpartition("/")[2]
    assert json.loads(r.row(made)["payload"]) == json.loads(r.row(task_id)["payload"])


def test_code_in_a_message_is_code_and_nothing_more(client: TestClient) -> None:
    """Messages of errors are of tasks."""
    claim = r.running()
    error = {"code": "handler_error", "message": "no `<b>` in <i>", "advice": "add `<b>`"}
    db.unit(lambda: lifecycle.finish(claim, Outcome("failed", error=error), "t"))
    log_in(client, VIEWER)
    for place in ("/", f"/ui/tasks/{claim.id}"):
        page = client.get(place).text
        assert "no <code>&lt;b&gt;</code> in &lt;i&gt;" in page or place != "/"
        assert "<b>" not in page and "<i>" not in page


def test_a_queue_that_nobody_takes_needs_somebody(client: TestClient) -> None:
    """As long as something waits on it."""
    log_in(client, VIEWER)
    assert "which no worker takes" not in client.get("/").text
    r.insert(queue="gpu")
    assert re.search("1 wait on the queue.*gpu.*, which no worker takes", client.get("/").text)
    r.add_worker(queues='["gpu"]')
    page = client.get("/")
    assert page.status_code == 200 and "which no worker takes" not in page.text


def test_what_runs_shows_its_last_line(client: TestClient) -> None:
    """Of each task its own, without what a terminal would do with it."""
    claims = [r.running(worker=f"w{number}") for number in range(3)]
    for number, claim in enumerate(claims[:2]):
        for part, said in enumerate(("early", f"{'x' * 400 * number}step \x1b[32m{number}\x1b[0m<b>")):
            lines = f"2026-11-25T10:00:00.000Z [1] before\n2026-11-25T10:00:00.000Z [1] {said}\n"
            db.unit(lambda claim=claim, part=part, lines=lines: leases.append_log(claim, part, lines))  # type: ignore[misc]
    log_in(client, VIEWER)
    page = client.get("/").text
    assert 'step <span class="a-f2">0</span>&lt;b&gt;' in page and 'step <span class="a-f2">1</span>&lt;b&gt;' in page
    assert "early" not in page and "before" not in page and page.count('class="doing"') == 2


def test_any_number_may_look_at_a_page_that_is_live_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only other pages must wait until there is room."""
    monkeypatch.setattr("tower.ui.live._MOST", 1)

    async def look() -> tuple[bool, bool]:
        live = Live()
        with live.on("one", dict):
            return live.has_room_for("one"), live.has_room_for("another")

    assert asyncio.run(look()) == (True, False)


def test_a_life_is_drawn_to_scale() -> None:
    """Every stretch between two events, attempt by attempt."""
    kinds = [
        ("queued", 0, 0.0),
        ("dispatched", 0, 5.0),
        ("started", 1, 6.0),
        ("cancel_requested", 1, 7.0),
        ("retry_scheduled", 1, 8.0),
        ("dispatched", 1, 9.0),
        ("started", 2, 9.5),
        ("succeeded", 2, 10.0),
    ]
    told = [{"kind": kind, "attempt": attempt, "at": at, "data": json.dumps({})} for kind, attempt, at in kinds]
    drawn = phases(told, 10.0)
    assert [(phase.kind, phase.start, phase.seconds) for phase in drawn] == [
        ("queued", 0.0, 5.0),
        ("dispatched", 500.0, 1.0),
        ("running", 600.0, 2.0),
        ("queued", 800.0, 1.0),
        ("dispatched", 900.0, 0.5),
        ("running", 950.0, 0.5),
    ]
    assert not any(phase.is_open for phase in drawn)
