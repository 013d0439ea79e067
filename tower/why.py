"""Why a task has not started, what would free it, and when that will be. Runs inside `db.read`."""

import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from peewee import Tuple, fn

from tower import db, load, queries
from tower.decision import (
    CONCURRENCY_KEY,
    KEY,
    NO_FREE_SLOT,
    NO_WORKER,
    NOT_BEFORE,
    PAUSED,
    QUARANTINE,
    QUEUE,
    RATE_LIMIT,
    RETRY_BACKOFF,
    TOWER,
    TYPE,
    Load,
    Obstacle,
    Place,
    Row,
    has_last_chance,
    measure,
    obstacle,
    obstacles,
)
from tower.estimate import play
from tower.models import Task, Worker, in_line
from tower.terms import DISPATCHED, IN_FLIGHT, QUEUED, RUNNING, SUCCEEDED
from tower.trace import rfc3339

#: Past runs of a type that tell how long it takes, and recent ends that tell the tower's pace.
_RUNS, _ENDS = 50, 200
#: Tasks ahead that are played forward one by one; beyond that the pace has to do.
_PLAYED = 1000
_HOLDERS = 5


@dataclass(frozen=True)
class Link:
    """One thing that a task waits for."""

    reason: str
    message: str
    frees: str
    task_id: str | None = None


@dataclass(frozen=True)
class Estimate:
    """When a task will start, and what that is built on: `simulation`, `throughput`, or `unknown` with the reason in `message`."""

    at: float | None
    basis: str
    message: str
    ahead: int
    typical_s: dict[str, float]


def why(task_id: str, lease_s: float) -> dict[str, Any]:
    """Return why a task is where it is, as a chain of what it waits for, and when it will start. Raises NotFound."""
    row = queries.task(task_id)
    told: dict[str, Any] = {"task_id": task_id, "status": row["status"], "reason": None, "estimate": None}
    if row["status"] not in (QUEUED, DISPATCHED):
        link = _runs(row) if row["status"] == RUNNING else _has_ended(row)
        return {**told, "summary": link.message, "chain": [asdict(link)]}
    workers = queries.live_workers(lease_s)
    now = load.read(lease_s)
    load.add_starts(now, [row])
    ahead = _count_ahead(row)
    if row["status"] == DISPATCHED:
        chain = [_is_handed_out(row, now)]
    else:
        found = list(obstacles(row, now))
        told["reason"] = found[0].reason if found else None
        chain = _chain(row, found, now, workers, ahead)
    if row["expires_at"] is not None:
        chain.append(_expires(row, now))
    summary = "; then ".join(_summed(chain))
    return {**told, "summary": summary, "chain": [asdict(link) for link in chain], "estimate": asdict(_estimate(row, now, workers))}


def _runs(row: Row) -> Link:
    now, usual = db.clock(), typical_s([row["type"]])
    host = Worker.select(Worker.host).where(Worker.id == row["worker_id"]).scalar()
    place = f"worker {row['worker_id']}{f' on {host}' if host else ''}"
    stopping = ", and was asked to stop" if row["cancel_requested_at"] is not None else ""
    return Link(RUNNING, f"runs on {place} for {span(now - row['started_at'])}{stopping}", _ends(row["type"], usual), row["id"])


def _has_ended(row: Row) -> Link:
    is_told = row["error_code"] and row["status"] not in (SUCCEEDED, row["error_code"])
    code = f" ({row['error_code']})" if is_told else ""
    return Link(
        row["status"],
        f"it ended as {row['status']}{code} at {rfc3339(row['finished_at'])}",
        f"nothing: POST /tasks/{row['id']}/retry makes a new task of it",
    )


def _is_handed_out(row: Row, now: Load) -> Link:
    message = f"handed to the workers {span(now.now - row['dispatched_at'])} ago, nobody has claimed it yet"
    return Link(DISPATCHED, message, "when a worker of its queue has a free slot")


def _expires(row: Row, now: Load) -> Link:
    left = row["expires_at"] - now.now
    message = f"it is given up at {rfc3339(row['expires_at'])}, in {span(left)}, if it has not started by then"
    return Link("expires", message if left > 0 else "its time is over, it is given up any moment", "nothing: a task keeps its expires_at")


def _chain(row: Row, found: Sequence[Obstacle], now: Load, workers: Sequence[Row], ahead: int) -> list[Link]:
    if not found and not ahead:
        return [Link("next", "nothing holds it up, the next look at the queue starts it", "the orchestrator actor's next pass")]
    chain = [link for one in _lasting(found) for link in _obstacle(row, one, now)]
    if any(one.reason in (NOT_BEFORE, RETRY_BACKOFF, NO_WORKER) for one in found):
        return chain
    if ahead:
        chain.append(Link("ahead", f"{ahead} ahead of it in queue {row['queue']}", "they start before it if they may"))
    slots = sum(worker["slots"] for worker in workers if row["queue"] in worker["queues"])
    if now.room <= 0 or now.queues.get(row["queue"], 0) <= 0:
        full = Link(NO_FREE_SLOT, f"all {slots} slots for queue {row['queue']} are taken", "when a task ends, or workers are added")
        chain.insert(len(chain) if chain and chain[0].reason != "ahead" else 0, full)
    return chain


def _lasting(found: Sequence[Obstacle]) -> list[Obstacle]:
    """Return what is to be told: of a task whose time is still to come, beside that, only what somebody has to end."""
    if any(one.reason in (NOT_BEFORE, RETRY_BACKOFF) for one in found):
        return [one for one in found if one.reason in (NOT_BEFORE, RETRY_BACKOFF, PAUSED, NO_WORKER)]
    return [one for one in found if one.reason != NO_FREE_SLOT]


def _obstacle(row: Row, found: Obstacle, now: Load) -> list[Link]:
    """Return the links for what keeps the task itself from starting."""
    name, until = _called(found.place), found.until or now.now
    when = f"at {rfc3339(until)}, in {span(until - now.now)}"
    if found.reason == NOT_BEFORE:
        return [Link(NOT_BEFORE, f"it may not start before {rfc3339(until)}", when)]
    if found.reason == RETRY_BACKOFF:
        return [Link(RETRY_BACKOFF, f"attempt {row['attempt']} ended with {row['error_code']}, the next one comes after a pause", when)]
    if found.reason == PAUSED:
        return [_pause(found.place, now)]
    if found.reason == RATE_LIMIT:
        used = f"{name} allows {found.limit} starts within {span(found.per_s or 0)}, and there were {found.count}"
        return [Link(RATE_LIMIT, used, when)]
    if found.reason == NO_WORKER:
        return [Link(NO_WORKER, f"no worker serves {name}", "when a worker with a handler on that queue starts")]
    return _holders(found, now)


def _pause(place: Place, now: Load) -> Link:
    rule = now.rule(*place)
    by, reason = f" by {rule.paused_by}" if rule.paused_by else "", f": {rule.reason}" if rule.reason else ""
    message = f"{_called(place)} is paused since {rfc3339(rule.paused_at)}{by}{reason}"
    return Link(PAUSED, message, f"when it is resumed: {_resume(*place)}")


def _resume(kind: str, name: str) -> str:
    """Return the command that ends a pause, to be pasted into a shell; whoever enqueues a task may have chosen the name."""
    if kind == TOWER:
        return "tower resume"
    return f"tower resume {kind} {'-- ' if name.startswith('-') else ''}{shlex.quote(name)}"


def _holders(found: Obstacle, now: Load) -> list[Link]:
    """Return a link for each task that holds a place of a limit, those that run longest first."""
    kind, name = found.place
    column = {KEY: Task.concurrency_key, TYPE: Task.type, QUEUE: Task.queue, QUARANTINE: Task.queue}.get(kind)
    columns = (Task.id, Task.type, Task.status, Task.started_at, Task.dispatched_at, Task.losses, Task.max_losses)
    query = Task.select(*columns).where(Task.status << IN_FLIGHT).order_by(Task.dispatched_at)
    there = (query if column is None else query.where(column == name)).dicts()
    rows = list(islice((row for row in there if kind != QUARANTINE or has_last_chance(row)), _HOLDERS))
    usual = typical_s({row["type"] for row in rows})
    allowed = "" if found.limit == 1 else f" ({found.count} of {found.limit})"
    called = _called(found.place)
    if found.reason == QUARANTINE:
        called = "it was lost with its workers; of such tasks one runs at a time, and the turn is"
    elif found.reason != CONCURRENCY_KEY:
        called = f"the limit of {called}"
    return [
        Link(found.reason, f"{called}{allowed} held by {row['id']}, {_since(row, now)}", _ends(row["type"], usual), row["id"])
        for row in rows
    ]


def _since(row: Row, now: Load) -> str:
    if row["status"] == DISPATCHED:
        return f"handed to the workers {span(now.now - row['dispatched_at'])} ago"
    return f"running {span(now.now - row['started_at'])}"


def _ends(type_: str, usual: dict[str, float]) -> str:
    known = f"tasks of type {type_} usually take {span(usual[type_])}" if type_ in usual else f"no task of type {type_} has succeeded yet"
    return f"when it ends; {known}"


def _called(place: Place) -> str:
    kind, name = place
    return "the tower" if kind == TOWER else f"rate key {name}" if kind == "rate" else f"{kind} {name}"


def _summed(chain: Sequence[Link]) -> list[str]:
    """Return the messages of a chain, of several holders of one limit the first and how many there are beside it."""
    told: dict[tuple[str, str], list[str]] = {}
    for link in chain:
        told.setdefault((link.reason, "" if link.task_id else link.message), []).append(link.message)
    return [texts[0] + (f" and {len(texts) - 1} more" if len(texts) > 1 else "") for texts in told.values()]


def _before(row: Row) -> Any:
    """Return the condition for those that may start now and come first in order."""
    return in_line() & (Tuple(Task.rank, Task.id) < Tuple(row["rank"], row["id"]))


def _count_ahead(row: Row) -> int:
    return int(Task.select(fn.COUNT(Task.id)).where(_before(row), Task.queue == row["queue"]).scalar())


def typical_s(types: Iterable[str]) -> dict[str, float]:
    """Return how long tasks of these types usually run: the median of the last fifty that succeeded; none for a type without any."""
    found = {}
    for type_ in sorted(set(types)):
        runs = Task.select(Task.finished_at - Task.started_at).where(Task.type == type_, Task.status == SUCCEEDED)
        lasted = [
            max(0.0, float(seconds)) for (seconds,) in runs.order_by(Task.finished_at.desc()).limit(_RUNS).tuples() if seconds is not None
        ]
        if lasted:
            found[type_] = statistics.median(lasted)
    return found


def _estimate(row: Row, now: Load, workers: Sequence[Row]) -> Estimate:
    """Play the decision forward, with slots alone as room: what waits at a worker has not started."""
    queued = _ready_before(row) if row["status"] == QUEUED else []
    if len(queued) > _PLAYED:
        return _by_pace(row, now)
    started = [dict(one) for one in Task.select(*load.COLUMNS, Task.status, Task.started_at).where(Task.status << IN_FLIGHT).dicts()]
    running = [one for one in started if one["status"] == RUNNING]
    handed = sorted((_free(one) for one in started if one["status"] == DISPATCHED), key=lambda one: (one["rank"], one["id"]))
    own = row if row["status"] == QUEUED else _free(row)
    ahead = [one for one in handed if row["status"] == QUEUED or (one["rank"], one["id"]) < (row["rank"], row["id"])] + queued
    usual = typical_s(one["type"] for one in [*running, *ahead])
    begin = measure(now.now, workers, _grouped(running), now.rules, prefetch=0)
    load.add_starts(begin, [*ahead, own])
    forecast = play(own, ahead, running, begin, usual)
    typical = {type_: round(seconds, 3) for type_, seconds in usual.items()}
    if forecast.at is not None:
        message = f"{len(running)} running and {len(ahead)} ahead of it, each taken to last as long as its type usually does"
        return Estimate(forecast.at, "simulation", message, len(ahead), typical)
    unknown = sorted({one["type"] for one in [*running, *ahead]} - usual.keys())
    return Estimate(None, "unknown", _cannot_be_told(forecast.held_by, unknown), len(ahead), typical)


def _ready_before(row: Row) -> list[Row]:
    query = Task.select(*load.COLUMNS).where(_before(row)).order_by(Task.rank, Task.id)
    return list[Row](db.ask(*query.limit(_PLAYED + 1).sql(), in_order=True))


def _free(row: Row) -> Row:
    """Return a task that was handed to the workers: it counts against its rate already, and waits for no time."""
    return {**row, "rate_key": None, "ready_at": 0.0}


def _grouped(running: Iterable[Row]) -> list[Row]:
    return [{**row, "count": 1, "holding": 1, "lowest": row["concurrency_limit"]} for row in running]


def _cannot_be_told(held_by: Obstacle | None, unknown: Sequence[str]) -> str:
    if held_by and held_by.reason == PAUSED:
        return f"{_called(held_by.place)} is paused, and nobody knows until when"
    if held_by and held_by.reason == NO_WORKER:
        return f"no worker serves {_called(held_by.place)}"
    if unknown:
        return f"how long tasks of type {', '.join(unknown)} take is not known: none has succeeded yet"
    return "it is too far away to tell"


def _by_pace(row: Row, now: Load) -> Estimate:
    """Return an estimate from how fast tasks have ended lately."""
    ahead = int(Task.select(fn.COUNT(Task.id)).where(_before(row)).scalar())
    ends = Task.select(Task.finished_at).where(Task.status == SUCCEEDED, Task.finished_at.is_null(False))
    times = [float(at) for (at,) in ends.order_by(Task.finished_at.desc()).limit(_ENDS).tuples()]
    found = obstacle(row, now)
    if found and found.reason in (PAUSED, NO_WORKER):
        return Estimate(None, "unknown", _cannot_be_told(found, ()), ahead, {})
    if not times:
        return Estimate(None, "unknown", "no task has succeeded yet, so the tower's pace is not known", ahead, {})
    seconds = max(now.now - times[-1], 0.001) / len(times)
    message = f"{ahead} ahead of it; the last {len(times)} tasks that succeeded ended {60 / seconds:.3g} a minute"
    return Estimate(now.now + ahead * seconds, "throughput", message, ahead, {})


def span(seconds: float) -> str:
    """Return a length of time in words as short as they may be: 0.2 s, 42 s, 5 min, 3 h, 2 d."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 s", " s")
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
