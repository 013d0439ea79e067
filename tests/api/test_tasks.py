"""Enqueue, list, show, events, cancel and retry."""

import json
from typing import Any

import pytest

from tests.api.conftest import count, forget_all_tasks, is_problem
from tests.conftest import Tower
from tower import db
from tower.errors import FAILURES
from tower.models import Task, new_id

LATER = "2500-01-01T00:00:00Z"
ENQUEUE, BATCH = "/tasks/enqueue", "/tasks/enqueue/batch"


def waiting(api: Tower, **more: Any) -> str:
    """Enqueue a task that does not start by itself."""
    return api.enqueue("echo", not_before=LATER, **more)


def key() -> str:
    return f"key-{new_id()}"


def test_a_task_is_accepted_with_its_address(api: Tower) -> None:
    """202, and Location says where to follow it."""
    answer = api.client.post(ENQUEUE, json={"type": "echo"})

    task_id = answer.json()["task_id"]
    assert (answer.status_code, answer.json(), answer.headers["location"]) == (202, {"task_id": task_id}, f"/tasks/{task_id}")
    assert api.wait(task_id)["status"] == "succeeded"


def test_everything_asked_for_is_kept(api: Tower) -> None:
    """Every field of the request is read back, times in UTC."""
    asked = {
        "type": "echo",
        "payload": {"text": "größer 😀", "deep": [{"n": 2**63 - 1, "f": 1.5, "none": None, "yes": True}]},
        "title": "Say hello",
        "priority": -60,
        "not_before": "2500-01-01T02:00:00.25+02:00",
        "timeout_s": 5,
        "max_attempts": 3,
        "concurrency_key": key(),
        "labels": {"team": "platform", "repo/name.x_y-z": ""},
        "requested_by": "alice",
    }
    task = api.task(api.client.post(ENQUEUE, json=asked).json()["task_id"])

    assert {name: task[name] for name in asked} == {**asked, "not_before": "2500-01-01T00:00:00.250Z"}
    assert (task["status"], task["wait_reason"], task["attempt"], task["correlation_id"]) == ("queued", "not_before", 0, task["id"])
    assert (task["result"], task["error"], task["started_at"], task["finished_at"]) == (None, None, None, None)


def test_what_is_not_asked_for_comes_from_the_type(api: Tower) -> None:
    """Only the type is needed."""
    task = api.task(api.enqueue("echo"))

    assert (task["payload"], task["labels"], task["priority"], task["not_before"]) == ({}, {}, 0, None)
    assert (task["queue"], task["timeout_s"], task["max_attempts"]) == ("default", 60, 1)


@pytest.mark.parametrize("where", ["field", "header", "both"])
def test_the_same_key_and_body_give_the_first_task(api: Tower, where: str) -> None:
    """A client that got no answer may simply ask again, and also say it in the other place."""
    name = key()
    first = api.client.post(ENQUEUE, json={"type": "echo", "payload": {"a": 1, "b": 2}, "idempotency_key": name})

    body: dict[str, Any] = {"payload": {"b": 2, "a": 1}, "type": "echo"} | ({} if where == "header" else {"idempotency_key": name})
    again = api.client.post(ENQUEUE, json=body, headers={} if where == "field" else {"Idempotency-Key": name})

    assert (first.status_code, again.status_code) == (202, 200)
    assert (again.json(), again.headers["location"]) == (first.json(), first.headers["location"])


@pytest.mark.parametrize(
    "other", [{"payload": {"a": 1.0}}, {"payload": {"a": True}}, {"title": "x"}, {"type": "sleep", "payload": {"seconds": 1}}]
)
def test_the_same_key_with_another_body_is_a_conflict(api: Tower, other: dict[str, Any]) -> None:
    """The answer names the task that has the key."""
    name = key()
    first = waiting(api, payload={"a": 1}, idempotency_key=name)
    body = {"type": "echo", "payload": {"a": 1}, "not_before": LATER, "idempotency_key": name}

    told = is_problem(api.client.post(ENQUEUE, json=body | other), 409, "idempotency_conflict")
    assert told["task_id"] == first
    assert api.client.post(ENQUEUE, json=body).json()["task_id"] == first


def test_a_key_in_header_and_field_must_agree(api: Tower) -> None:
    """Two keys in one request are a mistake."""
    told = is_problem(
        api.client.post(ENQUEUE, json={"type": "echo", "idempotency_key": "a"}, headers={"Idempotency-Key": "b"}), 422, "invalid_field"
    )
    assert told["field"] == "idempotency_key"


@pytest.mark.parametrize("bad", ["", "x" * 256, "a\tb"])
def test_a_key_in_the_header_follows_the_rules_of_the_field(api: Tower, bad: str) -> None:
    """One to 255 characters on one line."""
    is_problem(api.client.post(ENQUEUE, json={"type": "echo"}, headers={"Idempotency-Key": bad}), 422, "invalid_field")


@pytest.mark.slow
def test_a_batch_of_a_thousand_is_taken_whole_and_in_order(api: Tower) -> None:
    """One commit, one id for each, every label of every one."""
    labels = {f"label-{number}": "x" for number in range(12)}
    batch = [{"type": "echo", "title": f"task {number}", "not_before": LATER, "labels": labels} for number in range(1000)]
    answer = api.client.post(BATCH, json={"tasks": batch})

    ids = answer.json()["task_ids"]
    assert (answer.status_code, len(set(ids))) == (202, 1000)
    assert [api.task(ids[place])["title"] for place in (0, 499, 500, 999)] == ["task 0", "task 499", "task 500", "task 999"]
    found = api.client.get("/tasks", params={"label": ["label-0:x", "label-11:x"], "limit": 1}).json()["tasks"]
    assert found[0]["id"] == max(ids)
    forget_all_tasks()


@pytest.mark.parametrize("size", [0, 1001])
def test_a_batch_that_is_empty_or_over_a_thousand_is_refused(api: Tower, size: int) -> None:
    """Nothing of it is taken."""
    batch = [{"type": "echo", "requested_by": "crowd"}] * size
    told = is_problem(api.client.post(BATCH, json={"tasks": batch}), 422, "invalid_field")

    assert told["field"] == "tasks"
    assert count(api, "crowd") == 0


@pytest.mark.parametrize(
    ("bad", "field", "code"),
    [
        ({"type": "ehco"}, "tasks.2.type", "unknown_type"),
        ({"type": "echo", "priority": "high"}, "tasks.2.priority", "invalid_field"),
        ({"type": "command", "payload": {"argv": []}}, "tasks.2.payload.argv", "invalid_payload"),
        ({"type": "echo", "colour": "red"}, "tasks.2.colour", "invalid_field"),
        ("echo", "tasks.2", "invalid_field"),
    ],
)
def test_a_batch_with_one_bad_task_is_refused_whole_and_names_it(api: Tower, bad: Any, field: str, code: str) -> None:
    """All or none; the answer says which one and which field."""
    good = {"type": "echo", "requested_by": "crowd"}
    told = is_problem(api.client.post(BATCH, json={"tasks": [good, good, bad, good]}), 422, code)

    assert told["field"] == field
    assert count(api, "crowd") == 0


def test_a_batch_of_one_names_its_fields_as_any_batch(api: Tower) -> None:
    """The path to a field does not depend on the number of tasks."""
    told = is_problem(api.client.post(BATCH, json={"tasks": [{"type": "ehco"}]}), 422, "unknown_type")

    assert told["field"] == "tasks.0.type"


def test_a_batch_with_a_conflicting_key_is_refused_whole(api: Tower) -> None:
    """Also a conflict leaves nothing behind, whether with a task of before or within the batch."""
    name = key()
    waiting(api, idempotency_key=name)
    good = {"type": "echo", "requested_by": "crowd"}

    is_problem(api.client.post(BATCH, json={"tasks": [good, {**good, "idempotency_key": name}]}), 409, "idempotency_conflict")
    twice = [{**good, "idempotency_key": "twice"}, {**good, "idempotency_key": "twice", "title": "other"}]
    is_problem(api.client.post(BATCH, json={"tasks": [good, *twice]}), 409, "idempotency_conflict")
    assert count(api, "crowd") == 0


def test_a_batch_sent_again_with_keys_gives_the_same_tasks(api: Tower) -> None:
    """Keys make a batch safe to repeat, also when one stands in it twice."""
    name = key()
    batch = {"tasks": [{"type": "echo", "idempotency_key": f"{name}-{part}"} for part in ("a", "b", "a")]}
    first, again = api.client.post(BATCH, json=batch).json(), api.client.post(BATCH, json=batch).json()

    assert first == again
    assert first["task_ids"][0] == first["task_ids"][2] != first["task_ids"][1]


@pytest.mark.parametrize("name", ["key", ""])
def test_a_batch_has_no_key_of_its_own(api: Tower, name: str) -> None:
    """A header that were ignored would make a repeated batch twice."""
    good = {"type": "echo", "requested_by": "keyed"}
    answer = api.client.post(BATCH, json={"tasks": [good]}, headers={"Idempotency-Key": name})

    told = is_problem(answer, 422, "invalid_field")
    assert told["detail"] == "A batch has no key of its own; give each task of it an idempotency_key."
    assert count(api, "keyed") == 0


def listed(api: Tower, **filters: Any) -> list[str]:
    answer = api.client.get("/tasks", params=filters)
    assert answer.status_code == 200, answer.text
    return [task["id"] for task in answer.json()["tasks"]]


def test_pages_go_from_newest_to_oldest_without_gap_or_repeat(api: Tower) -> None:
    """Also when tasks arrive between two pages."""
    mark = key()
    ids = [waiting(api, labels={"run": mark}) for _ in range(7)]

    seen, cursor = [], None
    while True:
        params = {"label": f"run:{mark}", "limit": 3} | ({"cursor": cursor} if cursor else {})
        page = api.client.get("/tasks", params=params).json()
        seen += [task["id"] for task in page["tasks"]]
        assert len(page["tasks"]) <= 3
        waiting(api, labels={"run": mark})
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == sorted(ids, reverse=True)


def test_filters_narrow_together(api: Tower) -> None:
    """Several of one kind widen for status and type, and narrow for labels; kinds narrow each other."""
    mark = key()
    one = waiting(api, labels={"run": mark, "colour": "red"}, title="Deploy 100% of_it")
    two = waiting(api, labels={"run": mark, "colour": "blue: sky"}, title="deploy 100 of it")
    three = api.enqueue("sleep", {"seconds": 0}, labels={"run": mark}, not_before=LATER)
    api.client.post(f"/tasks/{three}/cancel")
    run = f"run:{mark}"

    assert listed(api, label=run) == [three, two, one]
    assert listed(api, label=run, status="queued") == [two, one]
    assert listed(api, label=run, status=["queued", "cancelled"]) == [three, two, one]
    assert listed(api, label=run, type="sleep") == [three]
    assert listed(api, label=run, type=["sleep", "echo"], status="queued") == [two, one]
    assert listed(api, label=[run, "colour:red"]) == [one]
    assert listed(api, label=[run, "colour:blue: sky"]) == [two]
    assert listed(api, label=[run, "colour:green"]) == []
    assert listed(api, label=run, text="DEPLOY 100") == [two, one]
    assert listed(api, label=run, text="100%") == [one]
    assert listed(api, label=run, text="of_it") == [one]
    assert listed(api, label=run, text="LEE") == [three]
    assert listed(api, label=run, text=two[9:]) == []
    assert listed(api, text=two.upper()) == [two]
    assert listed(api, correlation_id=two) == [two]


def test_tasks_are_found_by_their_time(api: Tower) -> None:
    """From the first time on, and before the second."""
    mark = key()
    one, two, three = (waiting(api, labels={"run": mark}) for _ in range(3))
    at = {task_id: api.task(task_id)["created_at"] for task_id in (one, two, three)}
    run = f"run:{mark}"

    assert one in listed(api, label=run, created_before="2500-01-01T00:00:00Z")
    assert listed(api, label=run, created_after="2500-01-01T00:00:00Z") == []
    assert three in listed(api, label=run, created_after=at[three])
    assert three not in listed(api, label=run, created_before=at[one])
    assert listed(api, label=run, created_after="1999-12-31T23:00:00-01:00", created_before="2000-01-01T00:00:01Z") == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("limit", "-1", "greater than or equal to 1"),
        ("limit", "0", "greater than or equal to 1"),
        ("limit", "501", "less than or equal to 500"),
        ("limit", "1000000000", "less than or equal to 500"),
        ("limit", "abc", "valid integer"),
        ("limit", "9" * 5000, "integer"),
        ("cursor", "abc", "'abc' is not a cursor; give the `next_cursor` of the page before"),
        ("cursor", "../../etc/passwd", "is not a cursor"),
        ("cursor", "00000000-0000-7000-8000-000000000000\n", "is not a cursor"),
        ("cursor", "' OR 1=1 --", "is not a cursor"),
        ("correlation_id", "abc", "'abc' is not a task id; GET /tasks lists them."),
        ("status", "done", "'queued', 'dispatched'"),
        ("status", ["queued"] * 21, "at most 20 items"),
        ("type", ["echo"] * 101, "at most 100 items"),
        ("label", ["a:b"] * 33, "at most 32 items"),
        ("label", "team", "write name:value"),
        ("label", "a:\x00", "NUL"),
        ("type", "x" * 401, "at most 400 characters"),
        ("text", "x" * 401, "at most 400 characters"),
        ("text", "a\x00b", "NUL"),
        ("created_after", "yesterday", "as in 2031-05-01T08:00:00Z"),
        ("created_after", "1700000000", "as in 2031-05-01T08:00:00Z"),
        ("created_after", "2031-05-01T08:00:00", "with a zone"),
        ("created_before", "2031-05-01T08:00:00 00:00", "%2B"),
        ("created_before", "nan", "as in"),
        ("created_before", "9999-12-31T23:59:59-23:59", "1970 to 9998"),
        ("created_before", "0001-01-01T00:00:00+23:59", "1970 to 9998"),
        ("created_before", "2031-13-41T99:00:00Z", "valid datetime"),
    ],
)
def test_a_bad_filter_is_refused_with_its_name_and_the_cure(api: Tower, name: str, value: Any, said: str) -> None:
    """A filter that cannot be meant never lists everything instead."""
    told = is_problem(api.client.get("/tasks", params={name: value}), 422, "invalid_field")

    assert told["field"].startswith(name)
    assert said in told["detail"]


@pytest.mark.parametrize(
    ("method", "path", "name", "said"),
    [
        ("GET", "/tasks", "statu", "There is no parameter 'statu'. Did you mean 'status'?"),
        ("GET", "/tasks", "lable", "There is no parameter 'lable'. Did you mean 'label'?"),
        ("GET", "/tasks", "Status", "There is no parameter 'Status'. Did you mean 'status'?"),
        ("GET", "/tasks", "zzz", "There is no parameter 'zzz'. Known: status, type, label, text, "),
        ("GET", "/tasks", "", "There is no parameter ''. Known: "),
        ("POST", "/tasks/enqueue", "priority", "There is no parameter 'priority'. Known: none."),
        ("POST", "/tasks/enqueue/batch", "by", "There is no parameter 'by'. Known: none."),
        ("GET", "/tasks/{id}", "text", "There is no parameter 'text'. Known: none."),
        ("GET", "/tasks/{id}/events", "afte", "There is no parameter 'afte'. Did you mean 'after'?"),
        ("GET", "/tasks/{id}/log", "folow", "There is no parameter 'folow'. Did you mean 'follow'?"),
        ("GET", "/tasks/{id}/log", "Range", "There is no parameter 'Range'. Known: follow."),
        ("GET", "/tasks/{id}/files", "task_id", "There is no parameter 'task_id'. Known: none."),
        ("GET", "/tasks/{id}/files/log.txt", "path", "There is no parameter 'path'. Known: none."),
        ("POST", "/tasks/{id}/cancel", "bye", "There is no parameter 'bye'. Did you mean 'by'?"),
        ("POST", "/tasks/{id}/retry", "zzz", "There is no parameter 'zzz'. Known: by."),
        ("GET", "/handlers", "type", "There is no parameter 'type'. Known: none."),
        ("GET", "/workers", "queue", "There is no parameter 'queue'. Known: none."),
        ("GET", "/queues", "name", "There is no parameter 'name'. Known: none."),
    ],
)
def test_a_parameter_that_a_route_does_not_have_is_refused(api: Tower, method: str, path: str, name: str, said: str) -> None:
    """A misspelt filter never lists everything, a misspelt option is never ignored."""
    task_id = waiting(api)
    answer = api.client.request(method, path.replace("{id}", task_id), params={name: "failed"})

    told = is_problem(answer, 422, "invalid_field")
    assert (told["detail"][: len(said)], told["field"]) == (said, name)
    assert api.task(task_id)["status"] == "queued"


def test_a_long_name_of_a_parameter_gets_a_short_answer(api: Tower) -> None:
    """The answer's size does not follow the request's."""
    answer = api.client.get("/tasks", params={"x" * 20_000: "1"})

    is_problem(answer, 422, "invalid_field")
    assert len(answer.content) < 1000


def test_a_list_tells_of_a_failure_in_short(api: Tower) -> None:
    """A page of tasks that failed with much to say stays small; the task itself says all."""
    mark = key()
    task_id = api.enqueue("echo", labels={"run": mark}, not_before=LATER)
    error = {"code": "exit_nonzero", "message": "é" * 5000, "exit_code": 3, "tail": "x" * 100_000}
    db.unit(lambda: Task.update(status="failed", error=json.dumps(error)).where(Task.id == task_id).execute())

    (told,) = api.client.get("/tasks", params={"label": f"run:{mark}"}).json()["tasks"]
    assert told["error"] == {"code": "exit_nonzero", "message": "é" * 1999 + "…", "advice": FAILURES["exit_nonzero"]}
    whole = api.task(task_id)["error"]
    assert (whole["message"], whole["details"]) == (error["message"], {"exit_code": 3, "tail": error["tail"]})


def test_a_forged_cursor_is_harmless(api: Tower) -> None:
    """A cursor is a place in the order of ids, whether or not a task stands there."""
    assert listed(api, cursor="00000000-0000-0000-0000-000000000000") == []
    assert listed(api, cursor="ffffffff-ffff-ffff-ffff-ffffffffffff", limit=1) == listed(api, limit=1)


def test_a_task_that_failed_says_why_and_what_to_do(api: Tower) -> None:
    """A code of the table, its sentence, the advice, and the handler's details."""
    task = api.wait(api.enqueue("command", {"argv": ["sh", "-c", "echo no luck; exit 3"]}))

    assert task["status"] == "failed"
    assert (task["error"]["code"], task["error"]["message"]) == ("exit_nonzero", "sh exited with code 3.")
    assert "log.txt" in task["error"]["advice"]
    assert (task["error"]["details"]["exit_code"], "no luck" in task["error"]["details"]["tail"]) == (3, True)


def test_events_tell_the_life_of_a_task_in_order(api: Tower) -> None:
    """Numbers grow, times do not go back, and a reader can go on after the last it knows."""
    task_id = api.enqueue("echo")
    api.wait(task_id)
    events = api.client.get(f"/tasks/{task_id}/events").json()["events"]

    assert [event["kind"] for event in events] == ["queued", "dispatched", "started", "succeeded"]
    assert [event["attempt"] for event in events] == [0, 0, 1, 1]
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    later = api.client.get(f"/tasks/{task_id}/events", params={"after": numbers[1]}).json()["events"]
    assert later == events[2:]
    assert api.client.get(f"/tasks/{task_id}/events", params={"after": 2**31 - 1}).json() == {"events": []}


@pytest.mark.parametrize("after", ["-1", "2147483648", "abc", "1e3"])
def test_a_bad_event_number_is_refused(api: Tower, after: str) -> None:
    """It is a number that the database can compare."""
    is_problem(api.client.get(f"/tasks/{waiting(api)}/events", params={"after": after}), 422, "invalid_field")


@pytest.mark.parametrize(
    "bad",
    [
        "0",
        "%00",
        "a%00b",
        "%20",
        "%2e%2e",
        "%2e%2e%2f%2e%2e",
        "A" * 36,
        "x" * 60_000,
        "%ed%a0%80",
        "%ff",
        "00000000-0000-7000-8000-00000000000G",
    ],
)
def test_an_id_that_cannot_be_one_is_refused(api: Tower, bad: str) -> None:
    """No raw text reaches the database or the disk."""
    for path in ("", "/events", "/log", "/files", "/files/log.txt"):
        answer = api.client.get(f"/tasks/{bad}{path}")
        assert answer.status_code in ((400,) if bad in ("%ff", "%ed%a0%80") else (404, 422))
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_waiting_task_is_cancelled_at_once_and_only_once(api: Tower) -> None:
    """Asking again changes nothing and says the same."""
    task_id = waiting(api)
    answer = api.client.post(f"/tasks/{task_id}/cancel", params={"by": "alice"})

    assert (answer.status_code, answer.json()) == (200, {"task_id": task_id, "status": "cancelled"})
    assert api.client.get(f"/tasks/{task_id}/events").json()["events"][-1]["data"]["by"] == "alice"
    again = api.client.post(f"/tasks/{task_id}/cancel")
    assert (again.status_code, again.json()) == (200, {"task_id": task_id, "status": "cancelled"})
    assert len(api.client.get(f"/tasks/{task_id}/events").json()["events"]) == 2


def test_a_task_that_ended_otherwise_cannot_be_cancelled(api: Tower) -> None:
    """A final state is never changed."""
    task_id = api.enqueue("echo")
    api.wait(task_id)
    told = is_problem(api.client.post(f"/tasks/{task_id}/cancel"), 409, "already_final")
    assert "is succeeded" in told["detail"]


def test_a_running_task_is_asked_to_stop(api: Tower) -> None:
    """The answer says that it still runs; asking twice is fine."""
    task_id = api.enqueue("sleep", {"seconds": 60})
    api.wait(task_id, "running")
    first, second = (api.client.post(f"/tasks/{task_id}/cancel") for _ in range(2))

    assert first.json() == {"task_id": task_id, "status": "running"}
    assert second.json()["status"] in ("running", "cancelled")
    task = api.wait(task_id)
    assert (task["status"], task["error"]["code"]) == ("cancelled", "cancelled")
    assert task["cancel_requested_at"] <= task["finished_at"]


def test_a_final_task_is_retried_as_a_new_one_of_its_tree(api: Tower) -> None:
    """The old one keeps its end."""
    old = waiting(api, title="again", labels={"run": "x"}, payload={"a": 1}, requested_by="alice", idempotency_key=key())
    api.client.post(f"/tasks/{old}/cancel")
    answer = api.client.post(f"/tasks/{old}/retry", params={"by": "bob"})

    new = answer.json()["task_id"]
    assert (answer.status_code, answer.headers["location"]) == (202, f"/tasks/{new}")
    task = api.wait(new)
    assert (task["status"], task["retry_of"], task["correlation_id"], task["requested_by"]) == ("succeeded", old, old, "bob")
    assert (task["title"], task["labels"], task["payload"]) == ("again", {"run": "x"}, {"a": 1})
    assert api.task(old)["status"] == "cancelled"


def test_a_task_that_is_not_final_is_not_retried(api: Tower) -> None:
    """The answer says what to do first."""
    told = is_problem(api.client.post(f"/tasks/{waiting(api)}/retry"), 409, "not_final")

    assert "cancel it first" in told["detail"]


@pytest.mark.parametrize("by", ["", "x" * 201, "a\nb", "a\x1b[31m"])
def test_who_asks_is_one_line(api: Tower, by: str) -> None:
    """It goes into the event, and from there into logs."""
    task_id = waiting(api)
    for verb in ("cancel", "retry"):
        is_problem(api.client.post(f"/tasks/{task_id}/{verb}", params={"by": by}), 422, "invalid_field")
    assert api.task(task_id)["status"] == "queued"


def test_a_limit_without_the_key_that_it_is_for_is_refused(api: Tower) -> None:
    """Whoever gives one means to hold tasks back, and nothing would; one at once is what each task says that has no key."""
    batch = {"tasks": [{"type": "echo", "concurrency_limit": 1}, {"type": "echo", "concurrency_limit": 2}]}
    told = is_problem(api.client.post("/tasks/enqueue/batch", json=batch), 422, "invalid_field")
    assert told["field"] == "tasks.1.concurrency_limit"
    assert told["detail"].startswith("concurrency_limit=2 is for tasks that share a concurrency_key")
    assert told["detail"].endswith("tower limit type echo --max-running 2")
    assert api.client.post("/tasks/enqueue", json=batch["tasks"][0]).status_code == 202


def test_a_task_that_could_never_start_is_refused(api: Tower) -> None:
    """Rather than kept waiting for a moment after its last one."""
    times = {"not_before": "2032-01-01T00:00:00Z", "expires_at": "2031-01-01T00:00:00Z"}
    answer = api.client.post("/tasks/enqueue/batch", json={"tasks": [{"type": "echo"}, {"type": "echo", **times}]})
    told = is_problem(answer, 422, "invalid_field")
    assert told["field"] == "tasks.1.expires_at"
    assert "it could never start" in told["detail"]
