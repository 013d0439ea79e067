"""The rows: tasks with what belongs to them, rules, workers. Times are seconds since the epoch, by the database's clock."""

import os
import random
import time
import uuid

from peewee import SQL, BigIntegerField, BlobField, CompositeKey, DoubleField, IntegerField, Model, TextField

from tower.db import database, likely
from tower.terms import DISPATCHED, QUEUED

_WAITING = f"('{QUEUED}', '{DISPATCHED}')"

#: Kinds of event that `tower fsck --repair` writes: here something is missing, and this was found to be wrong.
LOST, STRUCK = "lost", "struck"


#: Makes ids differ; no secret. It is seeded by the system, which is not asked for each id: that would give away Python's lock each time.
_chance = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_chance.seed)


def new_id() -> str:
    """Return a new UUID of version 7 (RFC 9562): ids made later sort later, to a quarter of a microsecond."""
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    # Several tasks a millisecond are made: what is left of the time takes the twelve bits that may hold a part of it.
    value = milliseconds << 80 | 0x7 << 76 | (rest * 4096 // 1_000_000) << 64 | 0x2 << 62 | _chance.getrandbits(62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def new_token() -> int:
    """Return a number that was never returned before."""
    return _chance.getrandbits(62)


#: Ids have the clock of the process that made them, times that of the database: no two of a tower are further apart than this.
CLOCKS_DIFFER_S = 86_400.0


def first_id(at: float) -> str:
    """Return what sorts before every id made at this time, in seconds since 1970, or later."""
    milliseconds = min(max(int(at * 1000), 0), (1 << 48) - 1)
    return str(uuid.UUID(int=milliseconds << 80))


class Row(Model):
    """Base of all rows: bound to the database that `db` opened."""

    class Meta:
        database = database
        legacy_table_names = False


class Task(Row):
    """One unit of work."""

    id = TextField(primary_key=True)
    #: Which handler runs it, and on which queue.
    type = TextField()
    queue = TextField()
    title = TextField(null=True)
    #: What the handler is given, as JSON text.
    payload = TextField()
    #: A string map, as JSON text; TaskLabel has the same to search by.
    labels = TextField()
    requested_by = TextField(null=True)
    status = TextField()

    #: Seconds of head start, and the order of starting: creation time minus that.
    priority = IntegerField()
    rank = DoubleField()
    #: When the client wants it to start, at the earliest.
    not_before = DoubleField(null=True)
    #: When it may start: that, or the end of a retry's back-off; 0 once that has come, see `reminders.wake`.
    ready_at = DoubleField(default=0)
    #: It may not start after this; what has not by then is timed_out.
    expires_at = DoubleField(null=True)
    #: At most `concurrency_limit` tasks with the same key are in flight; of several limits the lowest counts.
    concurrency_key = TextField(null=True)
    concurrency_limit = IntegerField(default=1)
    #: At most `rate_limit` tasks with the same rate key start within any `rate_per_s` seconds.
    rate_key = TextField(null=True)
    rate_limit = IntegerField(null=True)
    rate_per_s = DoubleField(null=True)
    #: The same for tasks that are restricted alike: same queue, type, keys and limits.
    lane = TextField()
    #: The client's name for this request, and a digest of its body.
    idempotency_key = TextField(null=True, unique=True)
    idempotency_hash = TextField(null=True)
    #: The task that asked for it, the tree it belongs to, the final task it repeats.
    parent_id = TextField(null=True)
    correlation_id = TextField()
    retry_of = TextField(null=True)

    #: The number of the current attempt; it grows at every claim and fences late workers.
    attempt = IntegerField(default=0)
    #: How many attempts failed by themselves, and how many lost their worker.
    failures = IntegerField(default=0)
    losses = IntegerField(default=0)
    max_attempts = IntegerField()
    #: Lost workers after which it fails; 1 when it may run at most once.
    max_losses = IntegerField()
    timeout_s = DoubleField()
    #: Seconds without output after which an attempt is timed_out.
    silence_s = DoubleField(null=True)

    #: The worker incarnation that holds, or last held, the lease.
    worker_id = TextField(null=True)
    #: Tell a claim and a finish whose commit was not answered from those of others.
    claim_token = TextField(null=True)
    finish_token = TextField(null=True)
    #: Grows with every heartbeat; the sweep takes a lease whose beat stands still.
    beat = IntegerField(default=0)
    cancel_requested_at = DoubleField(null=True)
    #: How often it was nudged in this status, and when the next nudge is due.
    nudges = IntegerField(default=0)
    nudge_at = DoubleField(default=0)

    #: What the handler returned, as JSON text.
    result = TextField(null=True)
    error_code = TextField(null=True)
    #: Why it did not succeed: {"code", "message", ...} as JSON text.
    error = TextField(null=True)

    #: The number of the last event or log chunk, and of the last one in the trace folder.
    seq = IntegerField(default=0)
    traced_seq = IntegerField(default=0)
    #: How many bytes of log.txt hold what was traced so far.
    traced_bytes = IntegerField(default=0)
    trace_tries = IntegerField(default=0)
    trace_due_at = DoubleField(default=0)
    trace_error = TextField(null=True)

    created_at = DoubleField()
    #: When it entered the queue, last.
    queued_at = DoubleField()
    dispatched_at = DoubleField(null=True)
    #: When the current attempt began.
    started_at = DoubleField(null=True)
    finished_at = DoubleField(null=True)
    updated_at = DoubleField()


class TaskLabel(Row):
    """One label of a task, to search by."""

    task_id = TextField()
    key = TextField()
    value = TextField()

    class Meta:
        primary_key = CompositeKey("task_id", "key")


class TaskEvent(Row):
    """What happened to a task; `seq` counts events and log chunks together."""

    task_id = TextField()
    seq = IntegerField()
    attempt = IntegerField()
    at = DoubleField()
    kind = TextField()
    #: JSON text.
    data = TextField()

    class Meta:
        primary_key = CompositeKey("task_id", "seq")


class TaskLog(Row):
    """Some whole lines of a task's log, as they stand in log.txt."""

    task_id = TextField()
    seq = IntegerField()
    attempt = IntegerField()
    #: Counts the chunks of an attempt, so that one whose commit was not answered is not added twice.
    part = IntegerField()
    text = TextField()

    class Meta:
        primary_key = CompositeKey("task_id", "seq")


class TaskArtifact(Row):
    """A piece of a file that a handler left."""

    task_id = TextField()
    name = TextField()
    part = IntegerField()
    attempt = IntegerField()
    data = BlobField()

    class Meta:
        primary_key = CompositeKey("task_id", "name", "part")


class TaskStart(Row):
    """One start that counts against a rate; forgotten when its window has passed."""

    rate_key = TextField()
    at = DoubleField()
    task_id = TextField()

    class Meta:
        primary_key = CompositeKey("rate_key", "at", "task_id")


class Rule(Row):
    """What restricts starting beside slots: a limit, a rate or a pause."""

    #: What it is for: the whole `tower` (its name is empty), a `queue`, a `type`, a concurrency `key`, or a `rate` key.
    kind = TextField()
    name = TextField()
    #: Tasks in flight at most.
    max_running = IntegerField(null=True)
    #: Starts at most within any so many seconds.
    rate_limit = IntegerField(null=True)
    rate_per_s = DoubleField(null=True)
    #: Set while nothing starts.
    paused_at = DoubleField(null=True)
    paused_by = TextField(null=True)
    reason = TextField(null=True)
    updated_at = DoubleField()

    class Meta:
        primary_key = CompositeKey("kind", "name")


class Decision(Row):
    """The one row by which passes see each other: what was decided before it changed is void."""

    id = IntegerField(primary_key=True)
    #: Another with each pass that starts something, and with each change of a rule.
    token = BigIntegerField()


class Worker(Row):
    """One incarnation of a process that runs actors."""

    id = TextField(primary_key=True)
    host = TextField()
    pid = IntegerField()
    #: With pid, who it is: see `host.ProcessId`.
    pid_space = TextField()
    pid_started = DoubleField()
    #: Tasks it runs at once, and the queues it serves as a JSON list.
    slots = IntegerField()
    queues = TextField()
    version = TextField()
    started_at = DoubleField()
    beat_at = DoubleField()


class ApiKey(Row):
    """A key that somebody comes in with; the key itself is nowhere."""

    #: What the key begins with, to recognise it by.
    id = TextField(primary_key=True)
    #: SHA-256 of the rest.
    digest = TextField()
    name = TextField()
    #: viewer, operator or admin.
    role = TextField()
    #: What it is limited to, as JSON: a list of types and a map of labels; empty is everything.
    types = TextField()
    labels = TextField()
    created_at = DoubleField()
    created_by = TextField(null=True)
    expires_at = DoubleField(null=True)
    revoked_at = DoubleField(null=True)
    #: When it was used last, to a minute.
    used_at = DoubleField(null=True)


class Audit(Row):
    """What somebody changed, beside the events of tasks."""

    id = TextField(primary_key=True)
    at = DoubleField()
    #: The name of the key, or anonymous.
    actor = TextField()
    #: As in `POST /pause`.
    action = TextField()
    #: What it was done to.
    target = TextField()
    address = TextField(null=True)


class SavedView(Row):
    """A filter of the task list that somebody saved."""

    id = TextField(primary_key=True)
    #: The id of the key whose view it is, or anonymous.
    owner = TextField()
    name = TextField()
    #: As it stands in the address.
    query = TextField()
    created_at = DoubleField()


TABLES = (Task, TaskLabel, TaskEvent, TaskLog, TaskArtifact, TaskStart, Rule, Decision, Worker, ApiKey, Audit, SavedView)


def _queued() -> SQL:
    """Return the condition that a task is queued, for a search by another index than that of statuses: very many may be."""
    return likely(f"status = '{QUEUED}'")


def in_line() -> SQL:
    """Return the condition that a task is queued and its time has come; those whose time is still to come have an index of their own."""
    return SQL(f"{_queued().sql} AND ready_at = 0")


def not_yet() -> SQL:
    """Return the condition that a task is queued and waits for its time."""
    return SQL(f"{_queued().sql} AND ready_at > 0")


def waiting() -> SQL:
    """Return the condition that a task has not started, for a search by another index than that of statuses."""
    return likely(f"status IN {_WAITING}")


def behind() -> tuple[SQL, SQL]:
    """Return the conditions that a folder lags behind: of a task that has begun, and of one that has not; each has an index of its own."""
    return SQL(f"traced_seq < seq AND status NOT IN {_WAITING}"), SQL(f"traced_seq < seq AND {waiting().sql}")
