"""The process log: one line per event, with the same fields everywhere."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from tower.settings import Settings

_NOISY = {
    "uvicorn.access": logging.WARNING,
    "uvicorn.error": logging.WARNING,
    "dramatiq": logging.WARNING,
    "httpx2": logging.WARNING,
    "httpcore2": logging.WARNING,
    "peewee": logging.INFO,
    "asyncio": logging.WARNING,
}


class _Formatter(logging.Formatter):
    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        error = self.formatException(record.exc_info) if record.exc_info else None
        if self._as_json:
            line = {"at": at, "level": record.levelname.lower(), "from": record.name, "msg": record.getMessage(), **fields}
            return json.dumps({**line, "error": error} if error else line, ensure_ascii=False, default=str)
        tail = "".join(f" {name}={_plain(value)}" for name, value in fields.items())
        return f"{at} {record.levelname:<7} {record.name}: {_one_line(record.getMessage())}{tail}" + (f"\n{error}" if error else "")


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def configure(settings: Settings) -> None:
    """Send the process log of the tower and its libraries to standard error, one line per event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(settings.log_format == "json"))
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper(), force=True)
    for name, level in _NOISY.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(max(level, logging.getLogger().level))


def context(task: str, attempt: int, **more: Any) -> dict[str, Any]:
    """Return the `extra` of a log call about a task, so that every such line carries the same fields."""
    return {"fields": {"task": task, "attempt": attempt, **more}}
