"""A file of a trace, shown in the page as what it is: nothing in it is run."""

import csv
import io
import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from tower import db, queries, trace
from tower.ui.page import Visit
from tower.ui.words import pretty

#: Bytes of a file, and rows and columns of a table, that are shown.
_MOST, _ROWS, _COLUMNS = 256 * 1024, 500, 50
#: Bytes of Markdown, and levels of JSON, that are set out: with more, either could be made to take minutes.
_PROSE, _LEVELS = 16 * 1024, 30
_PICTURES = (".png", ".jpg", ".jpeg", ".gif")
#: HTML in the text stays text, and links lead only where that is safe.
_markdown = MarkdownIt("js-default", {"html": False, "linkify": False})


def file(visit: Visit) -> dict[str, Any]:
    """Return what a page shows of one file."""
    task_id, name = visit.values["task_id"], visit.values["path"]
    row = db.read(lambda: queries.outline(task_id))
    path = trace.find_file(visit.settings.trace_dir, task_id, name)
    size = path.stat().st_size
    shown = _shown(path) if size else {"kind": "empty"}
    return {
        "title": f"{Path(name).name} · {row['title'] or row['type']}",
        "task_id": task_id,
        "task_name": row["title"] or row["type"],
        "path": name,
        "size": size,
        "siblings": trace.list_files(visit.settings.trace_dir, task_id),
        "is_cut": size > _MOST and shown["kind"] != "picture",
        **shown,
    }


def _shown(path: Path) -> dict[str, Any]:
    """Return the kind of a file and what is shown of it."""
    if path.suffix.lower() in _PICTURES:
        return {"kind": "picture"}
    with path.open("rb") as opened:
        raw = opened.read(_MOST)
    if b"\x00" in raw:
        return {"kind": "binary"}
    text = raw.decode("utf-8", "replace")
    return _SHOWN.get(path.suffix.lower(), _plain)(text)


def _plain(text: str) -> dict[str, Any]:
    return {"kind": "text", "lines": text.split("\n")}


def _prose(text: str) -> dict[str, Any]:
    if len(text) > _PROSE:
        return _plain(text)
    return {"kind": "markdown", "html": Markup(_markdown.render(text))}  # noqa: S704  # made without HTML of the file's own


def _json(text: str) -> dict[str, Any]:
    levels = max(accumulate((char in "[{") - (char in "]}") for char in text), default=0)
    if levels > _LEVELS:
        return _plain(text)
    try:
        return _plain(pretty(json.loads(text)))
    except (ValueError, RecursionError):
        return _plain(text)


def _table(text: str, delimiter: str = ",") -> dict[str, Any]:
    try:
        rows = [row[:_COLUMNS] for row, _ in zip(csv.reader(io.StringIO(text), delimiter=delimiter), range(_ROWS), strict=False)]
    except csv.Error:
        return _plain(text)
    return {"kind": "table", "head": rows[0] if rows else [], "rows": rows[1:]}


def _diff(text: str) -> dict[str, Any]:
    return {"kind": "diff", "lines": [(_of_diff(line), line) for line in text.split("\n")]}


def _of_diff(line: str) -> str:
    """Return what a line of a diff does."""
    if line.startswith(("+++", "---", "diff ", "index ")):
        return "file"
    return {"+": "added", "-": "removed", "@": "place"}.get(line[:1], "same")


_SHOWN: dict[str, Callable[[str], dict[str, Any]]] = {
    **dict.fromkeys((".md", ".markdown"), _prose),
    ".json": _json,
    ".csv": _table,
    ".tsv": partial(_table, delimiter="\t"),
    **dict.fromkeys((".diff", ".patch"), _diff),
}
