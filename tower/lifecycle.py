"""The state machine: every change of a task's status is made here, as one guarded update plus its event row.

Every function runs inside `db.unit`. A transition happened only if its update changed the row: messages come twice, workers come
back from the dead, and then nothing happens. See `moves.ARROWS` for what may follow what.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from peewee import SQL

from tower import db, moves
from tower.decision import QUARANTINE, has_last_chance
from tower.leases import Claim, append_log, appended, held, locked
from tower.models import Task, TaskLabel, new_token, waiting
from tower.moves import change, move, record
from tower.reminders import NUDGE_S, Nudge, rank
from tower.terms import CANCELLED, DISPATCHED, FAILED, FINAL, QUEUED, RUNNING, SUCCEEDED, TIMED_OUT

#: A failed attempt is repeated after this many seconds, then after twice as many, up to the ceiling, unless its type says otherwise.
BACKOFF_S, BACKOFF_CEILING_S = 2.0, 300.0
#: Characters of payloads that an event loop may be busy with at once: a millisecond's worth.
_MOST_SENT = 200_000


class NewTask(NamedTuple):
    """A task that was accepted but has no row yet; texts are JSON."""

    id: str
    type: str
    queue: str
    payload: str
    labels: dict[str, str]
    priority: int
    not_before: float | None
    timeout_s: float
    max_attempts: int
    max_losses: int
    correlation_id: str
    title: str | None = None
    requested_by: str | None = None
    concurrency_key: str | None = None
    idempotency_key: str | None = None
    idempotency_hash: str | None = None
    retry_of: str | None = None
    parent_id: str | None = None
    expires_at: float | None = None
    silence_s: float | None = None
    concurrency_limit: int = 1
    rate_key: str | None = None
    rate_limit: int | None = None
    rate_per_s: float | None = None
    #: The name of the key that it was asked for with.
    actor: str | None = None


class Outcome(NamedTuple):
    """How an attempt ended. `retry_after_s` is set only if the handler named it, else the back-off of the type holds."""

    status: str
    result: str | None = None
    error: dict[str, Any] | None = None
    may_retry: bool = True
    retry_after_s: float | None = None
    #: Seconds to wait after the first failure, and at most.
    backoff: tuple[float, float] = (BACKOFF_S, BACKOFF_CEILING_S)


class LogPart(NamedTuple):
    """Some lines of an attempt's log, and their number among its parts; doubtful if they may have been appended already."""

    part: int
    text: str
    is_doubtful: bool = False


class Ending(NamedTuple):
    """How an attempt ended, the token that its recording is known by, and the last lines of its log."""

    claim: Claim
    outcome: Outcome
    token: str
    tail: Sequence[LogPart] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it succeeded, and none of its log may be there already, as most do: then nothing has to be looked at first."""
        return self.outcome.status == SUCCEEDED and not any(part.is_doubtful for part in self.tail)


def insert(tasks: Sequence[NewTask]) -> set[str]:
    """Insert tasks as queued, each with its first event; return the ids of those whose key was new."""
    made = {new for some, data in _by_actor(tasks) for new in moves.insert(some, data)}
    _label(task for task in tasks if task.id in made)
    return made


def enter(tasks: Sequence[NewTask]) -> None:
    """Insert tasks of which none has a key, as `insert` does with less work."""
    for some, data in _by_actor(tasks):
        moves.enter(some, data)
    _label(tasks)


def can_send(tasks: Sequence[NewTask], *, is_alone: bool) -> bool:
    """Whether these tasks can be sent now, and are no more than what an event loop may be busy with; see `db.can_send`."""
    return db.can_send(is_alone=is_alone) and is_one_entry(tasks) and sum(len(task.payload) for task in tasks) <= _MOST_SENT


def send(tasks: Sequence[NewTask], then: db.Then) -> bool:
    """Insert tasks that can be sent as `enter` does, while the event loop goes on; see `db.send`."""
    ((some, data),) = _by_actor(tasks)
    return moves.send(some, data, then)


def is_one_entry(tasks: Sequence[NewTask]) -> bool:
    """Whether these tasks are entered by one statement."""
    return len(tasks) <= moves.ROWS and len({task.actor for task in tasks}) == 1 and not any(task.labels for task in tasks)


def _by_actor(tasks: Sequence[NewTask]) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Yield the rows of those that the same one asked for, and what their first events say."""
    for actor in dict.fromkeys(task.actor for task in tasks):
        yield [_row(task) for task in tasks if task.actor == actor], {"by": actor} if actor else {}


def _label(tasks: Iterable[NewTask]) -> None:
    labels = [{"task_id": task.id, "key": key, "value": value} for task in tasks for key, value in task.labels.items()]
    for some in moves.pieces(labels):
        TaskLabel.insert_many(some).on_conflict_ignore().execute()  # after a commit whose answer was lost they are there


def _row(task: NewTask) -> dict[str, Any]:
    restricted = (task.queue, task.type, task.concurrency_key, task.concurrency_limit, task.rate_key, task.rate_limit, task.rate_per_s)
    row = task._asdict()
    row["labels"], row["lane"] = json.dumps(task.labels, ensure_ascii=False) if task.labels else "{}", _lane(*restricted)
    return row


@lru_cache(maxsize=1000, typed=True)
def _lane(*restricted: str | float | None) -> str:
    """Return the lane of a task: a digest of all that restricts its start."""
    return hashlib.sha256(json.dumps(restricted).encode()).hexdigest()[:32]


def dispatch(ids: Sequence[str], token: int) -> list[Nudge]:
    """Mark queued tasks as chosen to start, and count their starts against their rates; return those that were still queued.

    None is if anything else has been decided since the decision of this token.
    """
    where, values = db.among("id", ids)
    rows = _start(DISPATCHED, "dispatched", {}, token, sets=_CHOSEN, where=where, values=values, returning=("queue",))
    return [Nudge(row["id"], row["type"], row["queue"]) for row in rows]


def start(
    ids: Sequence[str], token: int, worker_id: str, claim_token: str, decided: int | None = None, places: Mapping[str, str] | None = None
) -> list[Claim]:
    """Mark queued tasks as chosen to start and lease them to a worker at that moment: `dispatch` and `claim` in one.

    What is to follow without another look names the token that this decision gets. `places` tells where tasks have arrived, by id: they
    start from there, unless they have been entered meanwhile. A task that somebody is about to change, as by a
    cancel, is left alone: to wait for it while other rows are held would end in a circle.
    """
    where, values = db.among("id", ids)
    if db.is_postgres():
        where = db.found("id", f"SELECT id FROM task WHERE {where} FOR UPDATE SKIP LOCKED")
    rows = _start(
        RUNNING,
        "started",
        {"worker": worker_id},
        token,
        decided,
        via=DISPATCHED,
        sets={**_CHOSEN, **_LEASED},
        where=f"{where} AND {IN_TIME}",
        values=[worker_id, claim_token, *values],
        returning=("rank", *_CLAIM, "error"),
        places={task_id: places[task_id] for task_id in ids if task_id in places} if places else {},
    )
    return _as_claims(rows)


def _start(
    target: str, kind: str, data: dict[str, Any], token: int, decided: int | None = None, *, returning: Sequence[str], **how: Any
) -> list[moves.Row]:
    """Change queued tasks as `change` does, if nothing else has been decided since the decision of this token."""
    rows = change(
        target,
        (QUEUED,),
        kind,
        data,
        returning=(*returning, "rate_key"),
        allowed=(f"{_DECIDE} WHERE token = ? RETURNING id", (new_token() if decided is None else decided, token)),
        also=(f"{_START} SELECT rate_key, updated_at, id FROM moved WHERE rate_key IS NOT NULL", ()),
        **how,
    )
    if not db.is_postgres():
        moves.insert_lines(_START, [(row["rate_key"], row["updated_at"], row["id"]) for row in rows if row["rate_key"] is not None])
    return rows


_CHOSEN = {"nudges": "0", "nudge_at": f"{{now}} + {NUDGE_S}", "dispatched_at": "{now}"}
_LEASED = {
    "attempt": "attempt + 1",
    "worker_id": "?",
    "claim_token": "?",
    "beat": "beat + 1",
    "started_at": "{now}",
    "cancel_requested_at": "NULL",
}
_START = "INSERT INTO task_start (rate_key, at, task_id)"
_DECIDE = "UPDATE decision SET token = ?"


def void_decisions() -> None:
    """Let nothing start by what is being decided at this moment; after a change of rules."""
    db.rows(_DECIDE, [new_token()])


def claim(worker_id: str, token: str, *, task_id: str | None = None, queues: Sequence[str] = ()) -> Claim | None:
    """Lease a dispatched task to a worker: the one named, or the first in order of the queues; None if there is none.

    The attempt number grows, and fences whoever held an earlier one.
    """
    if task_id is None:
        return next(iter(claim_some(worker_id, token, 1, queues)), None)
    return next(iter(_claim(worker_id, token, "id = ?", [task_id])), None)


def claim_some(worker_id: str, token: str, most: int, queues: Sequence[str]) -> list[Claim]:
    """Lease the first dispatched tasks of these queues, in their order; see `claim`."""
    theirs, values = db.among("queue", queues)
    first = f"SELECT id FROM task WHERE status = '{DISPATCHED}' AND {theirs} AND {IN_TIME} ORDER BY rank, id LIMIT ?"
    chosen = db.found("id", f"{first} FOR UPDATE SKIP LOCKED" if db.is_postgres() else first)
    return _claim(worker_id, token, chosen, [*values, most])


#: A task may still start: its `expires_at` has not passed.
IN_TIME = "(expires_at IS NULL OR expires_at > {now})"


def _claim(worker_id: str, token: str, where: str, values: Sequence[Any]) -> list[Claim]:
    rows = change(
        RUNNING,
        (DISPATCHED,),
        "started",
        {"worker": worker_id},
        sets=_LEASED,
        where=f"{where} AND {IN_TIME}",
        values=[worker_id, token, *values],
        returning=("rank", *_CLAIM, "error"),
    )
    return _as_claims(rows)


def in_time() -> SQL:
    """Return the condition under which a task may still start: its `expires_at` has not passed."""
    return SQL(IN_TIME.format(now=db.now().sql))


def give_up_late(limit: int) -> list[str]:
    """End tasks that have not started by their `expires_at`; return their ids."""
    late = Task.select(Task.id).where(waiting(), Task.expires_at.is_null(False), Task.expires_at <= db.instant()).limit(limit)
    if db.is_postgres():
        late = late.for_update("FOR UPDATE SKIP LOCKED")
    ids = [row[0] for row in late.tuples()]
    error = {"code": "expired", "message": "It had not started by its expires_at."}
    ended = {"error_code": "expired", "error": json.dumps(error), "finished_at": db.now()}
    return [row["id"] for row in move(Task.id << ids, (QUEUED, DISPATCHED), TIMED_OUT, TIMED_OUT, error, **ended)]


def claimed(token: str) -> list[Claim]:
    """Return the claims that were made with this token, if their commit went through."""
    columns = [getattr(Task, name) for name in (*_CLAIM, "error")]
    found = Task.select(*columns).where(Task.status == RUNNING, Task.claim_token == token).order_by(Task.rank, Task.id)
    return [_as_claim(row) for row in found.dicts()]


#: The columns that make a claim, in the order of its fields but the last, which is the error of the attempt before.
_CLAIM = (
    *("id", "attempt", "claim_token", "worker_id", "type", "payload", "timeout_s", "silence_s"),
    *("max_attempts", "max_losses", "failures", "started_at"),
)
_in_claim = itemgetter(*_CLAIM)


def _as_claims(rows: Sequence[moves.Row]) -> list[Claim]:
    """Return the claims of these rows, in the order of the queue."""
    return [_as_claim(row) for row in sorted(rows, key=lambda row: (row["rank"], row["id"]))]


def _as_claim(row: dict[str, Any]) -> Claim:
    return Claim._make((*_in_claim(row), json.loads(row["error"]) if row["error"] else None))


def finish(claim: Claim, outcome: Outcome, token: str, tail: Sequence[LogPart] = ()) -> str | None:
    """Record how an attempt ended, with the last lines of its log; return the new status, None if the lease was gone.

    A failure with attempts left puts the task back into the queue, unless it was asked to stop.
    """
    return finish_all([Ending(claim, outcome, token, tail)])[0]


def finish_all(endings: Sequence[Ending]) -> list[str | None]:
    """Record how several attempts ended; see `finish`."""
    done = _succeed([ending for ending in endings if ending.is_plain])
    return [(SUCCEEDED if ending.claim.id in done else None) if ending.is_plain else _finish(ending) for ending in endings]


def is_one_write(endings: Sequence[Ending], takes: int) -> bool:
    """Whether each statement that records these ends, or claims so many tasks, is a transaction by itself; in SQLite it takes more."""
    return db.is_postgres() and (not endings or (not takes and all(ending.is_plain for ending in endings)))


def _succeed(endings: Sequence[Ending]) -> set[str]:
    if not endings:
        return set()
    given, values = db.listed([(*_held(ending.claim), ending.outcome.result, ending.token, len(ending.tail)) for ending in endings])
    sets = {"result": "column4", "error_code": "NULL", "error": "NULL", "finish_token": "column5", "finished_at": "{now}"}
    where = "id = column1 AND attempt = CAST(column2 AS integer) AND claim_token = column3"
    # The last lines come before the end, and take as many numbers.
    more = "CAST(column6 AS integer)"
    lines = [
        (ending.claim.id, len(ending.tail) - place, ending.claim.attempt, piece.part, piece.text)
        for ending in endings
        for place, piece in enumerate(ending.tail)
    ]
    also = _with_lines(lines) if lines and db.is_postgres() else ("", ())
    rows = change(SUCCEEDED, (RUNNING,), SUCCEEDED, {}, sets=sets, more=more, given=given, where=where, values=values, also=also)
    seqs = {row["id"]: row["seq"] for row in rows}
    if not db.is_postgres():
        moves.insert_lines(_LOG, [(task_id, seqs[task_id] - back, *line) for task_id, back, *line in lines if task_id in seqs])
    return set(seqs)


#: A task's id, how many numbers before its end, attempt, part, text.
_Line = tuple[str, int, int, int, str]
_LOG = "INSERT INTO task_log (task_id, seq, attempt, part, text)"


def _with_lines(lines: Sequence[_Line]) -> tuple[str, Sequence[Any]]:
    """Return the statement that keeps the last lines of attempts beside their end."""
    given, values = db.listed(lines)
    numbers = "moved.seq - CAST(column2 AS integer), CAST(column3 AS integer), CAST(column4 AS integer)"
    return f"{_LOG} SELECT moved.id, {numbers}, column5 FROM {given} JOIN moved ON moved.id = column1", values


def _held(claim: Claim) -> tuple[str, int, str]:
    return claim.id, claim.attempt, claim.token


def _finish(ending: Ending) -> str | None:
    claim, outcome, token = ending.claim, ending.outcome, ending.token
    row = locked(*held(claim))
    if row is None:
        return None
    _append(claim, ending.tail)
    failed = outcome.status in (FAILED, TIMED_OUT)
    if failed and row["cancel_requested_at"] is not None:
        return _end(claim, WAS_CANCELLED, token)
    if failed and outcome.may_retry and claim.failures + 1 < claim.max_attempts:
        return _try_again(claim, outcome, token)
    return _end(claim, outcome, token)


def _append(claim: Claim, tail: Sequence[LogPart]) -> None:
    for piece in tail:
        if not (piece.is_doubtful and appended(claim, piece.part)):
            append_log(claim, piece.part, piece.text)


def finished(task_id: str, token: str) -> str | None:
    """Return the status that `finish` or `release` set with this token, if its commit went through."""
    row = Task.select(Task.status).where(Task.id == task_id, Task.finish_token == token).tuples().first()
    return str(row[0]) if row else None


def _end(claim: Claim, outcome: Outcome, token: str) -> str | None:
    error = outcome.error or {}
    rows = move(
        _all(*held(claim)),
        (RUNNING,),
        outcome.status,
        outcome.status,
        {name: error[name] for name in ("code", "message") if name in error},
        result=outcome.result,
        error_code=error.get("code"),
        error=json.dumps(error, ensure_ascii=False) if error else None,
        failures=Task.failures + int(outcome.status in (FAILED, TIMED_OUT)),
        finish_token=token,
        finished_at=db.now(),
    )
    return outcome.status if rows else None


def _try_again(claim: Claim, outcome: Outcome, token: str) -> str | None:
    error = outcome.error or {}
    wait = outcome.retry_after_s if outcome.retry_after_s is not None else backoff_s(claim.failures + 1, *outcome.backoff)
    rows = move(
        _all(*held(claim)),
        (RUNNING,),
        QUEUED,
        "retry_scheduled",
        {"code": error.get("code"), "message": error.get("message"), "after_s": round(wait, 3)},
        error_code=error.get("code"),
        error=json.dumps(error, ensure_ascii=False),
        failures=Task.failures + 1,
        finish_token=token,
        **_requeued(wait),
    )
    return QUEUED if rows else None


def backoff_s(failures: int, first: float = BACKOFF_S, ceiling: float = BACKOFF_CEILING_S) -> float:
    """Return how long to wait after so many failures: doubling, up to a ceiling, with a third of jitter."""
    return float(min(ceiling, first * 2 ** min(failures - 1, 30)) * random.uniform(0.67, 1.0))


def release(claim: Claim, reason: str, token: str, tail: Sequence[LogPart] = (), *, has_run: bool = True) -> str | None:
    """Hand a running task back to the queue, because its worker cannot go on; that counts neither as failure nor as loss.

    Returns the new status, None if the lease was gone; a task that was asked to stop is cancelled instead, and one that may run
    at most once has failed, if its handler was called.
    """
    row = locked(*held(claim))
    if row is None:
        return None
    _append(claim, tail)
    if row["cancel_requested_at"] is not None:
        return _end(claim, WAS_CANCELLED, token)
    if has_run and claim.max_losses == 1:
        message = f"It ran when {reason}, and max_attempts=1 forbids a second run."
        return _end(claim, Outcome(FAILED, error={"code": "worker_lost", "message": message}), token)
    rows = move(_all(*held(claim)), (RUNNING,), QUEUED, "released", {"reason": reason}, finish_token=token, **_requeued(0))
    return QUEUED if rows else None


#: How an attempt ends that was asked to stop.
WAS_CANCELLED = Outcome(CANCELLED, error={"code": "cancelled", "message": "Cancelled while it ran."})


def _requeued(wait_s: float) -> dict[str, Any]:
    at = db.now()
    times = {"queued_at": at, "ready_at": at + wait_s if wait_s else 0, "nudge_at": at + wait_s}
    return {**times, "nudges": 0, "rank": rank()}


def undeliver(ids: Sequence[str]) -> list[str]:
    """Put dispatched tasks back into the queue because no worker serves it any more."""
    return [row["id"] for row in move(Task.id << list(ids), (DISPATCHED,), QUEUED, "undelivered", {}, **_requeued(0))]


def fence(task_id: str, attempt: int, beat: int) -> int | None:
    """Take the lease of a running task from a worker that is gone, unless it beat meanwhile; return the beat it stands at then.

    From here on its worker can neither renew, log nor finish, so its processes may be ended; then comes `expire`.
    """
    unchanged = (Task.id == task_id, Task.status == RUNNING, Task.attempt == attempt, Task.beat == beat)
    rows = Task.update(claim_token=None, beat=Task.beat + 1).where(*unchanged).returning(Task.beat).tuples()
    return next((int(row[0]) for row in rows), None)


def expire(task_id: str, attempt: int, beat: int, reason: str) -> str | None:
    """Give a task whose lease was taken its next state; return that, None if another sweep did."""
    unchanged = _all(Task.id == task_id, Task.attempt == attempt, Task.beat == beat)
    row = locked(unchanged, Task.status == RUNNING)
    if row is None:
        return None
    if row["cancel_requested_at"] is None and row["losses"] + 1 < row["max_losses"]:
        wait = backoff_s(row["losses"]) if row["losses"] else 0
        lost = {"losses": row["losses"] + 1}
        if has_last_chance({**row, **lost}):
            lost["lane"] = f"{QUARANTINE} {row['lane']}"  # it is restricted in one more way than those of its lane
        left = {"code": "worker_lost", "message": reason}
        why = {"error_code": "worker_lost", "error": json.dumps(left, ensure_ascii=False)}
        move(unchanged, (RUNNING,), QUEUED, "worker_lost", {"reason": reason}, **lost, **why, **_requeued(wait))
        return QUEUED
    status, error = FAILED, {"code": "worker_lost", "message": reason}
    if row["cancel_requested_at"] is not None:
        status, error = CANCELLED, {"code": "cancelled", "message": "Cancelled; its worker was lost meanwhile."}
    ended = {"error_code": error["code"], "error": json.dumps(error), "finished_at": db.now()}
    move(unchanged, (RUNNING,), status, status, error, losses=Task.losses + 1, **ended)
    return status


def cancel(task_id: str, by: str | None) -> str | None:
    """Cancel a task that is not running at once, and ask a running one to stop; return its status then, None if there is none."""
    cancel_all([task_id], by)
    row = Task.select(Task.status).where(Task.id == task_id).tuples().first()
    return str(row[0]) if row else None


def cancel_all(ids: Sequence[str], by: str | None) -> list[str]:
    """Cancel those that wait, ask those that run to stop; return the ids of those that were neither cancelled nor asked before."""
    query = Task.select(Task.id, Task.status).where(Task.id << list(ids), Task.status.not_in(FINAL), Task.cancel_requested_at.is_null())
    before = dict((query.order_by(Task.id).for_update() if db.is_postgres() else query).tuples())
    data = {"by": by} if by else {}
    running = [task_id for task_id, status in before.items() if status == RUNNING]
    if running:
        asked = (
            Task.update(cancel_requested_at=db.now(), seq=Task.seq + 1, updated_at=db.now())
            .where(Task.id << running, Task.status == RUNNING)
            .returning(Task.id, Task.seq, Task.attempt, Task.type, Task.updated_at)
            .dicts()
        )
        record(list(asked), "cancel_requested", data)
    waiting = [task_id for task_id, status in before.items() if status in (QUEUED, DISPATCHED)]
    if waiting:
        error = {"code": "cancelled", "message": "Cancelled while it waited."}
        ended = {"error_code": "cancelled", "error": json.dumps(error), "finished_at": db.now(), "cancel_requested_at": db.now()}
        move(Task.id << waiting, (QUEUED, DISPATCHED), CANCELLED, "cancelled", {**error, **data}, **ended)
    return list(before)


def _all(*conditions: Any) -> Any:
    whole = conditions[0]
    for condition in conditions[1:]:
        whole = whole & condition
    return whole
