"""The page of a log: some lines of it, a search, and pieces of it for the script that follows it."""

from contextlib import closing
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from tower import db, queries
from tower.errors import InvalidTask, TowerError
from tower.terms import FINAL
from tower.ui import log
from tower.ui.page import Page, Visit, refusal
from tower.ui.words import templates


def _number(visit: Visit, name: str) -> int | None:
    text = visit.query.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 13):
        raise InvalidTask(f"{name}: {text[:80]!r} is not a line number.", code="invalid_field", field=name)
    return int(text)


def _open(visit: Visit) -> tuple[dict[str, Any], log.Log]:
    """Return the task's row and its log, to be read without holding a connection to the database."""

    def work() -> tuple[dict[str, Any], log.Log]:
        row = queries.outline(visit.values["task_id"])
        return row, log.Log(visit.settings.trace_dir, row)

    return db.read(work)


def facts(visit: Visit) -> dict[str, Any]:
    """Return the lines that were asked for, or the last; and where a text is found."""
    wanted = visit.query.get("find", "")
    first = _number(visit, "line")

    row, shown = _open(visit)
    with closing(shown):
        window = log.window(shown, None if first is None else first - 5, log.PAGE)
        found = log.search(shown, wanted, _number(visit, "from") or 1) if wanted else None
    return {
        "title": f"Log · {row['title'] or row['type']}",
        "task_id": row["id"],
        "task_name": row["title"] or row["type"],
        "status": row["status"],
        "is_final": row["status"] in FINAL,
        "marked": first,
        "wanted": wanted,
        "per_page": log.PAGE,
        "log_at": "",
        "window": window,
        "found": found,
    }


LOG = Page("log.html", facts)


async def lines(visit: Visit) -> Response:
    """Answer with lines from a number on as HTML, and how many there are: what the script asks for while somebody scrolls or follows."""

    def work() -> dict[str, Any]:
        first, count = _number(visit, "first"), _number(visit, "count") or log.PAGE
        row, shown = _open(visit)
        with closing(shown):
            return {**log.window(shown, first, min(count, log.PAGE)), "status": row["status"], "is_final": row["status"] in FINAL}

    try:
        told = await run_in_threadpool(work)
    except TowerError as error:
        return await refusal(visit, error)
    html = templates.get_template("lines.html").render(lines=told["lines"], marked=None, log_at="")
    last = told["lines"][-1]["number"] if told["lines"] else told["first"] - 1
    return JSONResponse(
        {"html": html, "first": told["first"], "last": last, "count": told["count"], "status": told["status"], "is_final": told["is_final"]}
    )
