"""Why a task waits, in words, and when it will start, on both databases."""

import re
import shlex
import subprocess
from typing import Any

import pytest

from tests import rows as r
from tower import db, lifecycle
from tower.cli_rules import resume
from tower.decision import Limits, Load, measure
from tower.estimate import play
from tower.lifecycle import Outcome
from tower.models import Rule, Task, new_id
from tower.terms import SUCCEEDED
from tower.why import span, why

pytestmark = pytest.mark.usefixtures("rows")


def explain(task_id: str) -> dict[str, Any]:
    return db.read(lambda: why(task_id, 30.0))


def age(task_id: str, seconds: float) -> None:
    """Let a running task have begun so long ago."""
    db.unit(lambda: Task.update(started_at=Task.started_at - seconds).where(Task.id == task_id).execute())


def past_runs(type_: str, *lasted_s: float) -> None:
    """Let tasks of a type have succeeded that took so long."""
    for seconds in lasted_s:
        done = r.running(type=type_, worker="past")
        age(done.id, seconds)
        db.unit(lambda done=done: lifecycle.finish(done, Outcome(SUCCEEDED), new_id()))  # type: ignore[misc]


def test_a_task_that_is_given_up_says_when() -> None:
    """After what it waits for; also once it is handed out."""
    r.add_worker()
    rule("tower", "", paused_at=1.0)
    at = now() + 90
    task_id = r.insert(expires_at=at)
    told = explain(task_id)
    assert [link["reason"] for link in told["chain"]] == ["paused", "expires"]
    assert re.search(r"; then it is given up at \S+, in (90|89) s, if it has not started by then$", told["summary"])
    r.dispatch(task_id)
    assert [link["reason"] for link in explain(task_id)["chain"]] == ["dispatched", "expires"]


def rule(kind: str, name: str, **changes: Any) -> None:
    db.unit(lambda: Rule.insert(kind=kind, name=name, updated_at=0, **changes).execute())


def now() -> float:
    return db.read(db.clock)


def test_a_held_key_names_its_holder_and_how_many_are_ahead() -> None:
    """The chain in the order in which it must come undone."""
    r.add_worker()
    past_runs("echo", 60)
    holder = r.running(concurrency_key="repo:acme/api")
    age(holder.id, 42)
    for _ in range(3):
        r.insert(concurrency_key="repo:acme/api")
    told = explain(r.insert(concurrency_key="repo:acme/api"))

    assert told["reason"] == "concurrency_key"
    assert told["summary"] == f"key repo:acme/api held by {holder.id}, running 42 s; then 3 ahead of it in queue default"
    assert [link["reason"] for link in told["chain"]] == ["concurrency_key", "ahead"]
    assert told["chain"][0]["task_id"] == holder.id
    assert told["chain"][0]["frees"] == "when it ends; tasks of type echo usually take 60 s"
    # 18 s until the holder ends, then three that take 60 s each.
    assert told["estimate"]["at"] - now() == pytest.approx(18 + 3 * 60, abs=3)
    assert told["estimate"]["basis"] == "simulation"


def test_several_holders_are_all_named() -> None:
    """In the summary the first, in the chain each."""
    r.add_worker()
    ids = [r.running(concurrency_key="k", concurrency_limit=2).id for _ in range(2)]
    told = explain(r.insert(concurrency_key="k", concurrency_limit=2))
    assert [link["task_id"] for link in told["chain"]] == ids
    assert re.fullmatch(rf"key k \(2 of 2\) held by {ids[0]}, running .* s and 1 more", told["summary"])


@pytest.mark.parametrize(
    ("kind", "name", "reason", "called"),
    [
        ("type", "echo", "type_limit", "type echo"),
        ("queue", "default", "queue_limit", "queue default"),
        ("tower", "", "tower_limit", "the tower"),
    ],
)
def test_a_full_limit_names_whose_it_is_and_who_fills_it(kind: str, name: str, reason: str, called: str) -> None:
    """So that one knows which number to raise."""
    r.add_worker()
    holder = r.running()
    rule(kind, name, max_running=1)
    told = explain(r.insert())
    assert told["reason"] == reason
    assert told["summary"].startswith(f"the limit of {called} held by {holder.id}, running ")


def test_a_task_with_one_chance_left_waits_for_another_such() -> None:
    """And for none that was never lost."""
    r.add_worker()
    r.running()
    holder = r.running()
    task_id = r.insert()
    db.unit(lambda: Task.update(losses=2).where(Task.id << [holder.id, task_id]).execute())
    told = explain(task_id)
    assert told["reason"] == "quarantine"
    said = f"it was lost with its workers; of such tasks one runs at a time, and the turn is held by {holder.id}, running "
    assert told["summary"].startswith(said)
    assert [link["task_id"] for link in told["chain"]] == [holder.id]


def test_a_pause_tells_who_and_why_and_how_to_end_it() -> None:
    """When it ends nobody can tell."""
    r.add_worker()
    rule("queue", "default", paused_at=0.0, paused_by="alice", reason="upgrade")
    told = explain(r.insert())
    assert told["summary"] == "queue default is paused since 1970-01-01T00:00:00.000Z by alice: upgrade"
    assert told["chain"][0]["frees"] == "when it is resumed: tower resume queue default"
    assert (told["estimate"]["at"], told["estimate"]["basis"]) == (None, "unknown")
    assert told["estimate"]["message"] == "queue default is paused, and nobody knows until when"


def test_each_pause_is_told_and_what_comes_after_them() -> None:
    """Who ends one of them knows what else there is to do."""
    r.add_worker()
    holder = r.running(concurrency_key="k")
    for kind, name in (("tower", ""), ("type", "echo")):
        rule(kind, name, paused_at=0.0)
    told = explain(r.insert(concurrency_key="k"))
    since = "is paused since 1970-01-01T00:00:00.000Z"
    assert told["reason"] == "paused"
    assert re.fullmatch(rf"the tower {since}; then type echo {since}; then key k held by {holder.id}, running .* s", told["summary"])
    assert [link["frees"] for link in told["chain"][:2]] == [f"when it is resumed: tower resume{what}" for what in ("", " type echo")]


@pytest.mark.parametrize("key", ["a/b", "a b", "it's", "-x", "$(id)", "x;touch y", "ключ"])
def test_the_command_that_ends_a_pause_is_safe_to_paste(key: str) -> None:
    """A key is whatever somebody who may enqueue has called it."""
    r.add_worker()
    rule("key", key, paused_at=1.0)
    command = explain(r.insert(concurrency_key=key))["chain"][0]["frees"].removeprefix("when it is resumed: tower ")
    done = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line != "--"] == ["resume", "key", key]
    context = resume.make_context("resume", shlex.split(command)[1:])
    assert (context.params["kind"], context.params["name"]) == ("key", key)


def test_of_a_time_to_come_only_what_somebody_has_to_end_is_told_beside_it() -> None:
    """Who holds its key now will long have ended, but a pause ends by nobody's clock."""
    r.running(concurrency_key="k")
    rule("key", "k", paused_at=0.0)
    told = explain(r.insert(not_before=now() + 7200, concurrency_key="k", queue="gpu"))
    assert [link["reason"] for link in told["chain"]] == ["not_before", "paused", "no_worker"]


def test_a_rate_tells_when_its_window_frees() -> None:
    """To the moment."""
    r.add_worker()
    begin = now()
    r.dispatch(r.insert(rate_key="api", rate_limit=1, rate_per_s=60.0))
    told = explain(r.insert(rate_key="api", rate_limit=1, rate_per_s=60.0))
    assert told["reason"] == "rate_limit"
    assert told["summary"] == "rate key api allows 1 starts within 60 s, and there were 1"
    assert told["estimate"]["at"] == pytest.approx(begin + 60, abs=5)


def test_a_time_to_come_is_the_estimate() -> None:
    """If nothing else will be in its way."""
    r.add_worker()
    at = float(round(now())) + 7200
    told = explain(r.insert(not_before=at))
    assert told["reason"] == "not_before"
    assert told["summary"].startswith("it may not start before ")
    assert told["estimate"]["at"] == at


def test_a_pause_after_a_failure_names_the_failure() -> None:
    """And the attempt."""
    r.add_worker()
    broken = r.running(max_attempts=3)
    db.unit(
        lambda: lifecycle.finish(broken, Outcome("failed", error={"code": "exit_nonzero", "message": "no"}, retry_after_s=90), new_id())
    )
    told = explain(broken.id)
    assert told["reason"] == "retry_backoff"
    assert told["summary"] == "attempt 1 ended with exit_nonzero, the next one comes after a pause"


def test_without_a_worker_it_says_so() -> None:
    """And gives no time."""
    told = explain(r.insert(queue="gpu"))
    assert (told["reason"], told["summary"]) == ("no_worker", "no worker serves queue gpu")
    assert (told["estimate"]["at"], told["estimate"]["message"]) == (None, "no worker serves queue gpu")


def test_full_slots_are_counted() -> None:
    """With the time from what runs, once it is known how long that takes."""
    r.add_worker(slots=1)
    for _ in range(2):
        age(r.running().id, 10)
    waiting = r.insert()
    told = explain(waiting)
    assert (told["reason"], told["summary"]) == ("no_free_slot", "all 1 slots for queue default are taken")
    assert told["estimate"]["at"] is None
    assert told["estimate"]["message"] == "how long tasks of type echo take is not known: none has succeeded yet"

    past_runs("echo", 20, 30, 300)
    assert explain(waiting)["estimate"]["at"] - now() == pytest.approx(20, abs=3)


def test_what_nothing_holds_up_starts_now() -> None:
    """It only has to be looked at."""
    r.add_worker()
    told = explain(r.insert())
    assert (told["reason"], told["chain"][0]["reason"]) == (None, "next")
    assert told["estimate"]["at"] == pytest.approx(now(), abs=3)


def test_a_dispatched_task_waits_for_a_worker_to_claim_it() -> None:
    """For how long it has is told."""
    r.add_worker()
    task_id = r.insert()
    r.dispatch(task_id)
    told = explain(task_id)
    assert re.fullmatch(r"handed to the workers \S+ s ago, nobody has claimed it yet", told["summary"])
    assert told["estimate"]["at"] == pytest.approx(now(), abs=3)


def test_a_running_task_tells_its_worker_and_a_final_one_its_end() -> None:
    """They wait for nothing."""
    r.add_worker("w1")
    claim = r.running()
    age(claim.id, 42)
    told = explain(claim.id)
    assert (told["summary"], told["estimate"]) == ("runs on worker w1 on elsewhere for 42 s", None)
    db.unit(lambda: lifecycle.finish(claim, Outcome("failed", error={"code": "exit_nonzero", "message": "no"}), new_id()))
    assert explain(claim.id)["summary"].startswith("it ended as failed (exit_nonzero) at ")


def test_a_long_queue_is_told_by_the_pace_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what is played forward one by one."""
    monkeypatch.setattr("tower.why._PLAYED", 3)
    r.add_worker()
    past_runs("echo", 1, 1)
    for _ in range(5):
        r.insert()
    told = explain(r.insert())
    assert (told["estimate"]["basis"], told["estimate"]["ahead"]) == ("throughput", 5)
    assert told["estimate"]["at"] > now() - 3


def _row(number: int, **fields: Any) -> dict[str, Any]:
    from tests.test_decision import row

    return row(number, started_at=0.0, **fields)


def _load(slots: int, running: list[dict[str, Any]], rules: dict[Any, Limits] | None = None) -> Load:
    grouped = [{**one, "count": 1, "holding": 1, "lowest": one["concurrency_limit"]} for one in running]
    return measure(10.0, [{"slots": slots, "queues": ["a"]}], grouped, rules or {}, prefetch=0)


def test_a_forecast_plays_slots_keys_and_rates_forward() -> None:
    """Two slots, tasks of 30 s, one of which has run for 10."""
    running = [_row(1)]
    usual = {"echo": 30.0}
    free = play(_row(9), [], running, _load(2, running), usual)
    behind = play(_row(9), [_row(2), _row(3)], running, _load(2, running), usual)
    keyed = play(_row(9, concurrency_key="k"), [_row(2, concurrency_key="k")], running, _load(2, running), usual)
    assert (free.at, behind.at, keyed.at) == (10.0, 40.0, 40.0)

    limited = {"rate_key": "r", "rate_limit": 1, "rate_per_s": 100.0}
    assert play(_row(9, **limited), [_row(2, **limited)], [], _load(2, []), usual).at == 110.0


def test_a_forecast_of_what_runs_longer_than_usual_is_a_bit_from_now() -> None:
    """It may end any moment, but not in the past."""
    running = [_row(1)]
    assert play(_row(9), [], running, _load(1, running), {"echo": 5.0}).at == 10.5


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "0.2 s"), (2, "2 s"), (42.4, "42 s"), (100, "100 s"), (300, "5 min"), (10_800, "3 h"), (200_000, "2 d")]
)
def test_a_length_of_time_is_told_shortly(seconds: float, said: str) -> None:
    """In one unit."""
    assert span(seconds) == said
