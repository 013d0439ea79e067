"""The process log: one line per event, with the same fields everywhere."""

import json
import logging
import sys
import threading
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


class Outage:
    """Says once that something others depend on is away, and once that it is back."""

    def __init__(self, logger: logging.Logger, back: str) -> None:
        self._logger = logger
        self._back = back
        self._lock = threading.Lock()
        self._is_on = False

    def begin(self, message: str, *values: object) -> None:
        """Note that it is away; only the first note is told."""
        with self._lock:
            if not self._is_on:
                self._is_on = True
                self._logger.warning(message, *values)

    def end(self) -> None:
        """Note that it is there."""
        if self._is_on:
            with self._lock:
                if self._is_on:
                    self._is_on = False
                    self._logger.info(self._back)
