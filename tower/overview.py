"""What the first page tells of all tasks at once. Each question runs inside `db.read`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from tower import db, queries
from tower.models import Task, in_line, not_yet
from tower.queries import Filter
from tower.terms import BROKEN, CANCELLED, FINAL, IN_FLIGHT, SUCCEEDED

#: Tasks counted one by one; what is more is told as that.
MOST = 100
#: Tasks of each status in a bucket whose waits are read.
SAMPLE = 50
#: Tasks of a label that are counted for somebody who sees no others; callers whose buckets are kept.
LABELLED, _MOST_KEPT = 5000, 40
#: A bucket of the past is kept once no commit can be so late as to add to it.
_SETTLED_S = 60.0
MINUTE_S, HALF_HOUR_S, HOUR_S = 60, 1800, 3600


@dataclass(frozen=True)
class Bucket:
    """A stretch of time from `at` on: how many tasks ended in it, and the mean wait of up to SAMPLE of each outcome."""

    at: float
    succeeded: int
    broken: int
    waited_s: float

    @property
    def ended(self) -> int:
        """How many there were."""
        return self.succeeded + self.broken


def broken(within: Filter, since: float) -> list[str]:
    """Return the ids of up to MOST tasks since the hour of a time that failed or timed out and that nobody repeated, newest first."""
    chosen = replace(within, created_after=since - since % HOUR_S, retried=False)  # the same question for an hour
    # One status at a time: their ids are in order in the index, and nothing that succeeded is looked at.
    each = [_ids(replace(chosen, statuses=(status,)), "newest") for status in BROKEN if status != CANCELLED]
    return sorted(chain.from_iterable(each), reverse=True)[:MOST]


def waiting(within: Filter) -> list[str]:
    """Return the ids of up to MOST tasks that are next in the queue, and then of those whose time comes next."""
    return [*_ids(within, "in line"), *_ids(within, "not yet")][:MOST]


def in_flight(within: Filter) -> list[str]:
    """Return the ids of up to MOST tasks that workers have, longest first."""
    return _ids(replace(within, statuses=IN_FLIGHT), "longest")


def _ids(chosen: Filter, line: str) -> list[str]:
    statement, values = _question(chosen, line, db.is_postgres())
    # An index has the order of a whole line; of one that is narrowed it may have to be read to its end to find few.
    return [row["id"] for row in db.ask(statement, values, in_order=chosen == Filter())]


@lru_cache(maxsize=100)
def _question(chosen: Filter, line: str, is_postgres: bool) -> tuple[str, Sequence[Any]]:
    """Return the SELECT of the first MOST tasks of a line, for this kind of database, and its values; to spell it takes the longest."""
    order, only = {
        "newest": ((Task.id.desc(),), ()),
        "longest": ((Task.dispatched_at, Task.id), ()),
        "in line": ((Task.rank, Task.id), (in_line(),)),
        "not yet": ((Task.ready_at, Task.id), (not_yet(),)),
    }[line]
    query = Task.select(Task.id).where(*queries.conditions(chosen), *only).order_by(*order).limit(MOST)
    statement, values = query.sql()
    return statement, tuple(values)


def just_ended(within: Filter, limit: int) -> list[str]:
    """Return the ids of the tasks that ended last, newest first."""
    condition, values = _narrowed(within)
    last = f"finished_at IS NOT NULL{condition} ORDER BY finished_at DESC LIMIT {limit}"
    # One status at a time: their ends are in order in the index.
    each = [f"SELECT * FROM (SELECT finished_at, id FROM task WHERE status = '{status}' AND {last}) AS ended" for status in FINAL]
    found = db.rows(f"{' UNION ALL '.join(each)} ORDER BY finished_at DESC, id DESC LIMIT {limit}", values * len(FINAL))
    return [row["id"] for row in found]


def rows(*lists: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Return the tasks of lists of ids, all found by one question."""
    wanted = {task_id for ids in lists for task_id in ids}
    found = {row["id"]: row for row in queries.some(list(wanted))}
    return [[found[task_id] for task_id in ids if task_id in found] for ids in lists]


def last_lines(ids: Sequence[str]) -> dict[str, str]:
    """Return the end of the last line that each of these tasks wrote into its log; those that wrote nothing are missing."""
    one = "SELECT * FROM (SELECT task_id, substr(text, CASE WHEN length(text) > 300 THEN length(text) - 299 ELSE 1 END) AS text"
    each = f"{one} FROM task_log WHERE task_id = ? ORDER BY seq DESC LIMIT 1) AS found"
    found = db.rows(" UNION ALL ".join([each] * len(ids)), ids) if ids else []
    return {row["task_id"]: row["text"].rstrip("\n").rpartition("\n")[2] for row in found}


class Pace:
    """How many tasks ended, and how long they had waited, bucket by bucket; what cannot change any more is asked for once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Filter, int], dict[int, Bucket]] = {}

    def read(self, within: Filter, now: float) -> tuple[list[Bucket], list[Bucket]]:
        """Return the last hour by the minute and the last day by the half hour, oldest first."""
        minutes = self._read(within, now, _last(now, MINUTE_S, 60), MINUTE_S)
        numbers = _last(now, HALF_HOUR_S, 48)
        settled = [number for number in numbers if _is_settled(number, HALF_HOUR_S, now)]
        open_ones = [_half_hour(number, minutes) for number in numbers[len(settled) :]]  # they began within the hour
        return minutes, self._read(within, now, settled, HALF_HOUR_S) + open_ones

    def _read(self, within: Filter, now: float, numbers: Sequence[int], bucket_s: int) -> list[Bucket]:
        kept = self._kept.get((within, bucket_s), {})  # never changed, only replaced: many threads look at once
        unknown = [number for number in numbers if number not in kept]
        made = _made(within, unknown, bucket_s) if unknown else {}
        settled = {number: bucket for number, bucket in made.items() if _is_settled(number, bucket_s, now)}
        found = {**kept, **made}
        if settled:
            self._keep((within, bucket_s), {number: found[number] for number in numbers if number in kept or number in settled})
        return [found[number] for number in numbers]

    def _keep(self, key: tuple[Filter, int], buckets: dict[int, Bucket]) -> None:
        self._kept = {**dict(list(self._kept.items())[-_MOST_KEPT:]), key: buckets}


def _made(within: Filter, numbers: Sequence[int], bucket_s: int) -> dict[int, Bucket]:
    if within.within_labels:
        return _labelled(within, numbers, bucket_s)
    ended = _ended(within, numbers[0] * bucket_s, (numbers[-1] + 1) * bucket_s, bucket_s)
    return {number: _bucket(within, number, bucket_s, ended.get(number, {})) for number in numbers}


def _last(now: float, bucket_s: int, count: int) -> range:
    last = int(now // bucket_s)
    return range(last - count + 1, last + 1)


def _is_settled(number: int, bucket_s: int, now: float) -> bool:
    return now - (number + 1) * bucket_s > _SETTLED_S


def _half_hour(number: int, minutes: Sequence[Bucket]) -> Bucket:
    begin = number * HALF_HOUR_S
    return _together(begin, [bucket for bucket in minutes if begin <= bucket.at < begin + HALF_HOUR_S])


def _ended(within: Filter, begin: float, end: float, bucket_s: int) -> dict[int, dict[str, int]]:
    """Return how many tasks of each status ended in each bucket between two times; each status has an index of its own that tells."""
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    condition, values = _narrowed(within)
    each = [
        f"SELECT {_number(bucket_s)} AS bucket, '{status}' AS status, COUNT(*) AS count FROM task"
        f" WHERE status = '{status}' AND finished_at >= ? AND finished_at < ?{condition} GROUP BY 1"
        for status in FINAL
    ]
    for row in db.rows(" UNION ALL ".join(each), [begin, end, *values] * len(FINAL)):
        counts[row["bucket"]][row["status"]] = row["count"]
    return counts


def _number(bucket_s: int) -> str:
    """Return in SQL the number of the bucket that a task ended in."""
    whole = "FLOOR" if db.is_postgres() else ""  # where a cast rounds; SQLite may lack the function, and its cast cuts off
    return f"CAST({whole}(finished_at / {bucket_s}) AS integer)"


def _bucket(within: Filter, number: int, bucket_s: int, counts: dict[str, int]) -> Bucket:
    """Return a bucket; the waits of all its tasks would take as long to read as there are many, so the first of them stand for the rest."""
    condition, values = _narrowed(within)
    waits: list[float] = []
    for status in counts:
        found = db.rows(
            f"SELECT started_at - queued_at AS waited FROM task WHERE status = '{status}' AND finished_at >= ? AND finished_at < ?"
            f"{condition} ORDER BY finished_at LIMIT {SAMPLE}",
            [number * bucket_s, (number + 1) * bucket_s, *values],
        )
        waits += [max(0.0, row["waited"]) for row in found if row["waited"] is not None]
    succeeded = counts.get(SUCCEEDED, 0)
    return Bucket(number * bucket_s, succeeded, sum(counts.values()) - succeeded, sum(waits) / len(waits) if waits else 0.0)


def _labelled(within: Filter, numbers: Sequence[int], bucket_s: int) -> dict[int, Bucket]:
    """Return the buckets of somebody who sees the tasks with some labels only: of the newest LABELLED of them, since no index has both."""
    (key, value), *others = within.within_labels
    condition, values = _narrowed(replace(within, within_labels=tuple(others)))
    found = db.rows(
        f"SELECT {_number(bucket_s)} AS bucket, status, COUNT(*) AS count,"
        " AVG(CASE WHEN started_at > queued_at THEN started_at - queued_at WHEN started_at IS NOT NULL THEN 0 END) AS waited_s"
        f" FROM (SELECT task_id FROM task_label WHERE key = ? AND value = ? ORDER BY task_id DESC LIMIT {LABELLED}) AS newest"
        f" CROSS JOIN task WHERE id = newest.task_id AND finished_at >= ? AND finished_at < ?{condition} GROUP BY 1, 2",
        [key, value, numbers[0] * bucket_s, (numbers[-1] + 1) * bucket_s, *values],
    )
    parts: dict[int, list[Bucket]] = defaultdict(list)
    for row in found:
        good = row["count"] if row["status"] == SUCCEEDED else 0
        parts[row["bucket"]].append(Bucket(0, good, row["count"] - good, row["waited_s"] or 0.0))
    return {number: _together(number * bucket_s, parts[number]) for number in numbers}


def _together(at: float, parts: Sequence[Bucket]) -> Bucket:
    ended = sum(part.ended for part in parts)
    waited_s = sum(part.waited_s * part.ended for part in parts) / ended if ended else 0.0
    return Bucket(at, sum(part.succeeded for part in parts), sum(part.broken for part in parts), waited_s)


def _narrowed(within: Filter) -> tuple[str, list[Any]]:
    """Return what keeps to the tasks that a caller may see, as the end of a WHERE, and its values."""
    narrowed = [f"type IN ({','.join('?' * len(within.within_types))})"] if within.within_types else []
    values: list[Any] = list(within.within_types)
    for key, value in within.within_labels:
        narrowed.append("id IN (SELECT task_id FROM task_label WHERE key = ? AND value = ?)")
        values += [key, value]
    return "".join(f" AND {condition}" for condition in narrowed), values
