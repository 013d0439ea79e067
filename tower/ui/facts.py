"""What the pages about many things tell: the tower, the tasks, the fleet, settings, keys, the record."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, get_args
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from tower import audit, db, keys, load, overview, queries, rules, views
from tower.api import dashboard
from tower.decision import QUEUE, TOWER, TYPE
from tower.errors import InvalidTask
from tower.queries import Filter
from tower.spec import Status
from tower.terms import BROKEN, IN_FLIGHT, QUEUED, STATUSES
from tower.ui.charts import chart
from tower.ui.log import Line
from tower.ui.page import Visit
from tower.ui.task import curl, told

_DAY_S = 86_400.0
#: How far back the first page looks for what needs somebody.
_NEEDS_S = 7 * _DAY_S
_PER_PAGE, _PER_COLUMN, _OFFERED = 50, 20, 8
_LABELS = 32
#: Tasks that one look searches for what no index finds.
_SEARCHED = 5_000


def tower(visit: Visit) -> dict[str, Any]:
    """Return what needs a person, what runs, what waits, what just ended, and how the tower does."""
    health = visit.orchestrator.readiness()

    def work() -> dict[str, Any]:
        now, within = db.clock(), visit.within
        needs, running, waiting = overview.broken(within, now - _NEEDS_S), overview.in_flight(within), overview.waiting(within)
        lists = overview.rows(needs[:8], running[:15], waiting[:10], overview.just_ended(within, 10))
        lines = overview.last_lines([row["id"] for row in lists[1]])
        for row in lists[1]:
            row["doing"] = Line(0, lines.get(row["id"], "")).told()["text"]
        shown = dict(zip(("needs", "running", "waiting", "ended"), ([told(row) for row in rows] for rows in lists), strict=True))
        hour, day = visit.pace.read(within, now)
        workers, taken = queries.live_workers(visit.settings.lease_s), queries.running_counts()
        limits = rules.listed()
        return {
            **shown,
            "needs_count": len(needs),
            "running_count": len(running),
            "waiting_count": len(waiting),
            "hour": chart(hour),
            "day": chart(day),
            "workers": workers,
            "slots": sum(worker["slots"] for worker in workers),
            "taken": sum(taken.values()),
            "queues": _queues(visit, workers, limits),
            "pauses": [rule for rule in limits if rule["paused_at"] is not None],
            "curl": curl(visit, {"type": "echo", "payload": {"hello": "tower"}}),
            "is_new": not needs and not running and not waiting and not queries.tasks(within, before=None, limit=1),
        }

    return {"title": "Tower", "health": health, "most": overview.MOST, **db.read(work)}


def _queues(visit: Visit, workers: list[dict[str, Any]], limits: Sequence[rules.RuleRow]) -> list[dict[str, Any]]:
    counts = queries.queues()
    paused = {rule["name"] for rule in limits if rule["kind"] == QUEUE and rule["paused_at"] is not None}
    return [
        {
            "name": name,
            "types": [kind.name for kind in visit.registry if kind.queue == name],
            **dict.fromkeys((QUEUED, *IN_FLIGHT), 0),
            **counts.get(name, {}),
            "paused": name in paused,
            "slots": sum(worker["slots"] for worker in workers if name in worker["queues"]),
        }
        for name in sorted({*visit.registry.queues, *counts})
    ]


def chosen(query: QueryParams, within: Filter) -> Filter:
    """Return the filter that an address names; raise InvalidTask for a value that means nothing."""
    statuses = [status for status in query.getlist("status") if status]
    for status in statuses:
        if status not in get_args(Status):
            known = ", ".join(STATUSES)
            raise InvalidTask(f"There is no status {status[:80]!r}; known: {known}.", code="invalid_field", field="status")
    labels = [label.strip() for text in query.getlist("label") for label in text.split(",") if label.strip()]
    if len(labels) > _LABELS:
        raise InvalidTask(f"A filter has at most {_LABELS} labels, got {len(labels)}.", code="invalid_field", field="label")
    for label in labels:
        if ":" not in label:
            raise InvalidTask(f"The label {label[:80]!r} has no colon; write name:value.", code="invalid_field", field="label")
    return replace(
        within,
        statuses=tuple(statuses),
        types=tuple(name for name in query.getlist("type") if name),
        labels=tuple((name, value) for name, _, value in (label.partition(":") for label in labels)),
        text=query.get("text", "").strip() or None,
        error_codes=tuple(code for code in query.getlist("error_code") if code),
        correlation_id=query.get("correlation_id", "").strip() or None,
        worker_id=query.get("worker", "").strip() or None,
        created_after=_time(query.get("after", ""), "after"),
        created_before=_time(query.get("before", ""), "before"),
        retried={"yes": True, "no": False}.get(query.get("retried", "")),
    )


def _time(text: str, name: str) -> float | None:
    """Return a time in UTC as a browser's field writes it: a day, or a day and a time."""
    if not text.strip():
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError):
        said = f"{text[:80]!r} is not a time; write it in UTC as in 2031-05-01T08:00."
        raise InvalidTask(said, code="invalid_field", field=name) from None


#: Parameters of the list that say what is asked for, in the order that the form has them.
FILTERS = ("status", "type", "label", "text", "error_code", "worker", "correlation_id", "after", "before", "retried")
#: Those, and what else makes a difference to the page of tasks.
ASKS = frozenset((*FILTERS, "view", "cursor"))


def without(query: QueryParams, *names: str) -> str:
    """Return a query without some of its parameters, and without those that are empty."""
    return urlencode([(name, value) for name, value in query.multi_items() if value and name not in names])


def tasks(visit: Visit) -> dict[str, Any]:
    """Return a page of the tasks that fit, or the newest of each status side by side."""
    query = visit.query
    filter_ = chosen(query, visit.within)
    is_board = query.get("view") == "board"
    found: dict[str, Any] = {
        "title": "Tasks",
        "query": query,
        "is_board": is_board,
        "types": sorted(kind.name for kind in visit.registry),
        "statuses": STATUSES,
        "filters": without(query, "cursor", "view", "live", "said"),
        "is_filtered": any(query.get(name) for name in FILTERS),
        "views": db.read(lambda: views.listed(visit.caller)),
        "broken": BROKEN,
    }
    if is_board:
        columns = filter_.statuses or STATUSES
        board = db.read(lambda: _board(filter_, columns))
        return {**found, "board": {status: [told(row) for row in rows] for status, rows in board.items()}, "per_column": _PER_COLUMN}
    rows, cursor, searched = db.read(lambda: _page(filter_, query.get("cursor") or None))
    return {**found, "rows": [told(row) for row in rows], "next_cursor": cursor, "searched": searched}


def _board(filter_: Filter, columns: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    within = _bounded(filter_, None)
    return {status: queries.tasks(replace(within, statuses=(status,)), before=None, limit=_PER_COLUMN) for status in columns}


def _bounded(filter_: Filter, before: str | None) -> Filter:
    """Return the filter of one look: where no index finds what is asked for, it goes only so far."""
    is_searched = any(
        (filter_.text, filter_.worker_id, filter_.error_codes, filter_.retried, filter_.created_after, filter_.created_before)
    )
    return replace(filter_, not_older_than=queries.older_by(before, _SEARCHED)) if is_searched else filter_


def _page(filter_: Filter, before: str | None) -> tuple[list[dict[str, Any]], str | None, int | None]:
    """Return a page of tasks, where the next begins, and how many tasks were searched if there may be more fitting ones behind those."""
    within = _bounded(filter_, before)
    rows = queries.tasks(within, before=before, limit=_PER_PAGE + 1)
    if len(rows) > _PER_PAGE:
        return rows[:_PER_PAGE], rows[_PER_PAGE - 1]["id"], None
    return rows, within.not_older_than, _SEARCHED if within.not_older_than else None


def find(visit: Visit) -> list[dict[str, Any]]:
    """Return the newest tasks whose title, type or id holds a text: what the palette offers while it is typed."""
    asked = chosen(QueryParams(text=visit.query.get("text", "")), visit.within)
    rows = db.read(lambda: queries.tasks(_bounded(asked, None), before=None, limit=_OFFERED))
    return [{"id": row["id"], "name": row["title"] or row["type"], "status": row["status"]} for row in rows]


def handlers(visit: Visit) -> dict[str, Any]:
    """Return the task types, their defaults and schemas."""
    paused = {name for kind, name in db.read(load.paused) if kind == TYPE}
    kinds = [
        {
            "name": kind.name,
            "summary": kind.summary,
            "queue": kind.queue,
            "timeout_s": kind.timeout_s,
            "max_attempts": kind.max_attempts,
            "schema": kind.payload.model_json_schema(),
            "paused": kind.name in paused,
        }
        for kind in sorted(visit.registry, key=lambda kind: kind.name)
    ]
    return {"title": "Handlers", "kinds": kinds}


def fleet(visit: Visit) -> dict[str, Any]:
    """Return the workers, the queues, and what restricts them."""

    def work() -> dict[str, Any]:
        workers, taken = queries.live_workers(visit.settings.lease_s), queries.running_counts()
        listed = rules.listed()
        return {
            "workers": [{**worker, "running": taken.get(worker["id"], 0)} for worker in workers],
            "queues": _queues(visit, workers, listed),
            "rules": listed,
            "is_paused": any(rule["kind"] == TOWER and rule["paused_at"] is not None for rule in listed),
        }

    return {"title": "Workers and queues", **db.read(work)}


def settings(visit: Visit) -> dict[str, Any]:
    """Return the settings in force, without secrets."""
    described = {
        name: field.description for name, field in zip(visit.settings.masked(), type(visit.settings).model_fields.values(), strict=True)
    }
    given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in visit.settings.masked().items()}
    warnings, has_dashboard = visit.settings.warnings(), dashboard.exists(visit.settings)
    return {"title": "Settings", "given": given, "described": described, "warnings": warnings, "has_dashboard": has_dashboard}


def key_list(visit: Visit) -> dict[str, Any]:
    """Return the keys that open this tower."""

    def work() -> dict[str, Any]:
        now = db.clock()
        rows = [
            {**row, "types": json.loads(row["types"]), "labels": json.loads(row["labels"]), "is_over": _is_over(row, now)}
            for row in keys.listed()
        ]
        return {"keys": rows}

    said: dict[str, Any] = {"made": None, "error": None, "fields": {}, **visit.said}
    return {"title": "Keys", "types": sorted(kind.name for kind in visit.registry), **db.read(work), **said}


def _is_over(row: dict[str, Any], now: float) -> bool:
    return row["revoked_at"] is not None or (row["expires_at"] is not None and row["expires_at"] <= now)


def record(visit: Visit) -> dict[str, Any]:
    """Return a page of the record of who changed what."""
    rows = db.read(lambda: audit.entries(visit.query.get("cursor") or None, _PER_PAGE + 1))
    return {"title": "Audit", "rows": rows[:_PER_PAGE], "next_cursor": rows[_PER_PAGE - 1]["id"] if len(rows) > _PER_PAGE else None}


def confirm(visit: Visit) -> dict[str, Any]:
    """Return what is to be confirmed, as the form found it."""
    return {"title": "Are you sure?", **visit.said}
