"""The rows of many tasks at once, page by page, in bounded memory."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from peewee import fn

from tower import db, queries
from tower.fsck.rows import Case
from tower.models import Task, TaskEvent, TaskLabel, TaskLog

_PAGE = 200
#: Characters of payloads and results held at once; a single task may have more.
_MOST_TEXT = 16_000_000


def cases() -> Iterator[Case]:
    """Yield every task, oldest first."""
    last = ""
    while page := db.read(partial(queries.ids, last, _PAGE)):
        for some in _light(page):
            yield from db.read(partial(load, some))
        last = page[-1]


def _light(ids: list[str]) -> list[list[str]]:
    """Return the ids in groups whose rows fit into memory together."""
    size = fn.SUM(fn.LENGTH(Task.payload) + fn.COALESCE(fn.LENGTH(Task.result), 0))
    total = db.read(lambda: Task.select(size).where(Task.id << ids).scalar())
    return [ids] if int(total or 0) <= _MOST_TEXT else [[task_id] for task_id in ids]


def load(ids: Sequence[str]) -> list[Case]:
    """Return those of the tasks that exist; inside `db.read` or `db.unit`."""
    rows = [dict(row) for row in Task.select().where(Task.id << list(ids)).order_by(Task.id).dicts()]
    events = _by_task(TaskEvent.select().where(TaskEvent.task_id << list(ids)).order_by(TaskEvent.task_id, TaskEvent.seq))
    chunks = _by_task(TaskLog.select(TaskLog.task_id, TaskLog.seq, TaskLog.attempt).where(TaskLog.task_id << list(ids)))
    labels = _by_task(TaskLabel.select().where(TaskLabel.task_id << list(ids)))
    return [
        Case(
            row,
            events[row["id"]],
            {chunk["seq"]: chunk["attempt"] for chunk in chunks[row["id"]]},
            {label["key"]: label["value"] for label in labels[row["id"]]},
        )
        for row in rows
    ]


def _by_task(query: Any) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in query.dicts():
        found[row["task_id"]].append(dict(row))
    return found
