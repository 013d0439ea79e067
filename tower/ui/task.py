"""What the page of one task tells."""

import json
import shlex
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from tower import db, queries, trace
from tower.api.answers import detail, event, summary
from tower.models import Task
from tower.terms import BROKEN, FINAL
from tower.ui import log
from tower.ui.charts import phases
from tower.ui.page import Visit
from tower.ui.words import pretty, readable
from tower.why import why

#: Tasks of a tree that are shown with it.
_RELATIVES = 100
_EVENTS = 500
_TAIL = 200
#: Characters of a payload or result that a page shows; the rest is a link away.
_MOST_TEXT = 30_000
#: Fields of a task that a request may say, and that hold what they hold by default.
_DEFAULTS = {"priority": 0, "labels": {}, "concurrency_limit": 1}


def told(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a list shows it: as the API tells it, with times as numbers."""
    return {
        **summary(row),
        **{name: value for name, value in row.items() if name.endswith("_at")},
        "doing": row.get("doing"),
        "name": row["title"] or row["type"],
    }


def task(visit: Visit) -> dict[str, Any]:
    """Return everything about a task."""
    task_id = visit.values["task_id"]

    def work() -> dict[str, Any]:
        row, now = queries.task(task_id), db.clock()
        happened = queries.events(task_id, limit=_EVENTS)
        is_final = row["status"] in FINAL
        return {
            "row": row,
            "now": now,
            "happened": happened,
            "why": None if is_final else why(task_id, visit.settings.lease_s),
            "relatives": [told(other) for other in _relatives(visit, row)],
            "phases": phases(happened, happened[-1]["at"] if len(happened) == _EVENTS else row["finished_at"] or now),
            "log": log.Log(visit.settings.trace_dir, row),
        }

    found = db.read(work)
    row = found.pop("row")
    with closing(found.pop("log")) as shown:
        tail = log.window(shown, None, _TAIL)
    full = detail(row)
    files = trace.list_files(visit.settings.trace_dir, task_id)
    is_final = row["status"] in FINAL
    return {
        **found,
        "tail": tail,
        "log_at": f"/ui/tasks/{task_id}/log",
        "has_more_events": len(found["happened"]) == _EVENTS,
        "title": row["title"] or f"{row['type']} {task_id[:8]}",
        "task": {**full, **told(row), "error": full["error"]},
        "is_final": is_final,
        "can_retry": row["status"] in FINAL,
        "is_broken": row["status"] in BROKEN,
        "input": _shown(full["payload"]),
        "output": None if full["result"] is None else _shown(full["result"]),
        "details": _shown(full["error"]["details"]) if full["error"] and full["error"]["details"] else None,
        "events": [{**event(one), "at": one["at"], "data": json.loads(one["data"])} for one in found["happened"]],
        "waited_s": (row["started_at"] or row["finished_at"] or found["now"]) - row["created_at"],
        "ran_s": (row["finished_at"] or found["now"]) - row["started_at"] if row["started_at"] else None,
        "artifacts": [file for file in files if file["path"].startswith(f"{trace.ARTIFACTS}/")],
        "files": [file for file in files if not file["path"].startswith(f"{trace.ARTIFACTS}/")],
        "curl": _curl(visit, row),
    }


def _relatives(visit: Visit, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tasks of the same tree, and those that repeat it or that it repeats, oldest first, as far as whoever looks may see them."""
    same = [Task.correlation_id == row["correlation_id"], Task.retry_of == row["id"]]
    if row["retry_of"]:
        same.append(Task.id == row["retry_of"])
    others = [Task.id != row["id"], *queries.conditions(visit.within)]
    found: dict[str, dict[str, Any]] = {}
    for condition in same:  # one by one: for any of them at once, no index would be looked up
        some = queries.slim(Task.select(*queries.SLIM).where(condition, *others).order_by(Task.id).limit(_RELATIVES))
        found |= {one["id"]: one for one in some}
    yield from [found[task_id] for task_id in sorted(found)][:_RELATIVES]


def _shown(value: Any) -> dict[str, Any]:
    """Return a value as indented JSON, cut where a page ends."""
    text = pretty(value)
    return {"text": text[:_MOST_TEXT], "is_cut": len(text) > _MOST_TEXT}


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """Return the request that would make this task again."""
    names = ("type", "title", "priority", "timeout_s", "silence_s", "max_attempts", "concurrency_key", "concurrency_limit")
    said = {name: row[name] for name in names if row[name] not in (None, _DEFAULTS.get(name))}
    if row["concurrency_key"] is None:
        said.pop("concurrency_limit", None)
    if row["rate_key"]:
        said["rate"] = {"key": row["rate_key"], "limit": row["rate_limit"], "per_s": row["rate_per_s"]}
    labels = json.loads(row["labels"])
    return {**said, "payload": json.loads(row["payload"]), **({"labels": labels} if labels else {})}


def curl(visit: Visit, body: dict[str, Any]) -> str:
    """Return the command that asks for a task from a shell."""
    return f"{curl_without_body(visit)} \\\n  -d {shlex.quote(readable(body))}"


def curl_without_body(visit: Visit) -> str:
    """Return how that command begins; the key is one of the environment, since a page has none to tell."""
    key = ' -H "authorization: Bearer $TOWER_KEY"' if visit.caller.key_id else ""
    return f"curl -s -X POST {shlex.quote(visit.origin + '/tasks/enqueue')} -H 'content-type: application/json'{key}"


def _curl(visit: Visit, row: dict[str, Any]) -> str:
    text = curl(visit, asked(row))
    return text if len(text) <= _MOST_TEXT else ""
