"""The trace folder's format: what each file says, and how it is read back. `folder` writes it."""

import errno
import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import orjson

from tower import db, queries
from tower.errors import FAILURES, NotFound
from tower.models import LOST, STRUCK
from tower.terms import FINAL, SUCCEEDED

INPUT, LOG, OUTPUT, EVENTS, ARTIFACTS = "input.json", "log.txt", "output.json", "events.jsonl", "artifacts"

#: Log chunks taken at once: a few MB of memory at most.
_BATCH = 16

_AS_ACCEPTED = (
    *("id", "type", "title", "priority", "timeout_s", "silence_s", "max_attempts", "idempotency_key"),
    *("concurrency_key", "concurrency_limit", "rate_key", "rate_limit", "rate_per_s"),
)
#: Events that do not end an attempt.
_ENDS_NOTHING = ("cancel_requested", LOST, STRUCK)
_ORIGIN = ("requested_by", "parent_id", "correlation_id", "retry_of")


@lru_cache(maxsize=1000)
def rfc3339(at: float | None) -> str | None:
    """Return seconds since the epoch as a UTC time with milliseconds, such as 2031-05-01T08:00:00.000Z."""
    if at is None:
        return None
    # Down to the millisecond, never up: a list of what was created at this time or later begins with the task itself.
    second, millisecond = divmod(math.floor(at * 1000), 1000)
    return f"{_second(second)}.{millisecond:03d}Z"


@lru_cache(maxsize=1000)
def _second(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").removesuffix("+00:00")


def render_input(task: dict[str, Any]) -> str:
    """Return input.json: the task as it was accepted."""
    told = {
        **{name: task[name] for name in _AS_ACCEPTED},
        "not_before": rfc3339(task["not_before"]),
        "expires_at": rfc3339(task["expires_at"]),
        "labels": _told(task["labels"]),
        **{name: task[name] for name in _ORIGIN},
        "created_at": rfc3339(task["created_at"]),
        "payload": json.loads(task["payload"]),
    }
    return _document(told)


def render_output(task: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """Return output.json: how the task ended, with every attempt."""
    error = json.loads(task["error"]) if task["error"] and task["status"] != SUCCEEDED else None
    if error:
        error = {**error, "advice": FAILURES.get(error.get("code", ""))}
    first_start = next((event["at"] for event in events if event["kind"] == "started"), None)
    ended = task["finished_at"]
    return _document(
        {
            "id": task["id"],
            "type": task["type"],
            "status": task["status"],
            "result": json.loads(task["result"]) if task["result"] else None,
            "error": error,
            "attempts": attempts(events),
            "created_at": rfc3339(task["created_at"]),
            "started_at": rfc3339(first_start),
            "finished_at": rfc3339(ended),
            "waited_s": round((first_start or ended) - task["created_at"], 3),
            "ran_s": round(ended - first_start, 3) if first_start else 0,
        }
    )


def attempts(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every attempt with its worker, times and end, as the events tell them."""
    made: dict[int, dict[str, Any]] = {}
    for event in events:
        number, data = event["attempt"], _told(event["data"])
        if event["kind"] == "started":
            made[number] = {
                "attempt": number,
                "worker": data.get("worker"),
                "started_at": rfc3339(event["at"]),
                "ended_at": None,
                "end": None,
            }
        elif number in made and made[number]["end"] is None and event["kind"] not in _ENDS_NOTHING:
            made[number].update(ended_at=rfc3339(event["at"]), end=event["kind"])
    return list(made.values())


def render_events(events: Iterable[dict[str, Any]]) -> str:
    """Return events.jsonl: every event, each line carrying the SHA-256 of the line before, so that a cut or change shows."""
    lines, before = [], ""
    for event in events:  # written by hand at half the cost: a kind is a plain word, and the data are JSON already
        which = f'"seq":{event["seq"]},"at":"{rfc3339(event["at"])}","attempt":{event["attempt"]}'
        line = f'{{{which},"kind":"{event["kind"]}","data":{event["data"]},"previous":"{before}"}}'
        before = hashlib.sha256(line.encode()).hexdigest()
        lines.append(f"{line}\n")
    return "".join(lines)


def log_line(at: float, attempt: int, text: str) -> str:
    """Return one line of log.txt."""
    return f"{rfc3339(at)} [{attempt}] {text}\n"


def render_log(entries: Iterable[dict[str, Any]]) -> str:
    """Return log.txt, or the part of it that these events and log chunks make, in the order given."""
    return "".join(_event_line(entry) if entry.get("text") is None else entry["text"] for entry in entries)


def log_pieces(task: dict[str, Any], after: int) -> Iterator[bytes]:
    """Yield log.txt from behind number `after` to what the row tells, some chunks at a time."""
    while after < task["seq"]:
        entries = db.read(partial(queries.log_entries, task["id"], after, _BATCH))
        entries = [entry for entry in entries if entry["seq"] <= task["seq"]]
        if not entries:
            return
        after = entries[-1]["seq"]
        yield render_log(entries).encode()


def artifact_parts(task_id: str, name: str, count: int) -> Iterator[bytes]:
    """Yield a file that a task left, part by part."""
    for part in range(count):
        yield db.read(partial(queries.artifact_part, task_id, name, part))


@lru_cache(maxsize=100)
def _told(data: str) -> Mapping[str, Any]:
    """Return the data of an event, or labels; most have none, or name the same worker."""
    return dict(json.loads(data))


def _event_line(event: dict[str, Any]) -> str:
    return log_line(event["at"], event["attempt"], f"── {event['kind']}{_in_words(event['data'])}")


@lru_cache(maxsize=100)
def _in_words(data: str) -> str:
    """Return the data of an event as it stands in a line of the log."""
    told = {name: value for name, value in _told(data).items() if value is not None}
    return "".join(f" {name}={json.dumps(value, ensure_ascii=False)}" for name, value in told.items())


def _document(value: Any) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
    except TypeError:  # a result may hold a number of more than 64 bits
        return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def list_files(root: Path, task_id: str) -> list[dict[str, Any]]:
    """Return the path, size and time of every file in a task's folder; empty if there is none yet."""
    top = root / task_id
    if top.is_symlink():
        return []
    found = []
    for folder, folders, names in os.walk(top, followlinks=False):
        folders[:] = sorted(filter(_is_shown, folders))
        for name in sorted(filter(_is_shown, names)):
            path = Path(folder, name)
            try:
                info = path.lstat()
            except FileNotFoundError:
                continue  # replaced meanwhile
            if stat.S_ISREG(info.st_mode):
                found.append({"path": path.relative_to(top).as_posix(), "size": info.st_size, "modified_at": rfc3339(info.st_mtime)})
    return found


def _is_shown(name: str) -> bool:
    """Whether a name is not hidden, and text: a file system takes any bytes."""
    return not name.startswith(".") and not any("\ud800" <= character <= "\udfff" for character in name)


def find_file(root: Path, task_id: str, path: str) -> Path:
    """Return where a file of a task's folder is; raise NotFound for anything that is not a plain file inside it."""
    place = root
    try:
        for part in (task_id, *path.split("/")):
            place = place / part
            if part == "" or "\x00" in part or not _is_shown(part) or place.is_symlink():
                break
        else:
            if place.is_file():
                return place
    except OSError:  # a name longer than the file system takes, or a folder that is closed to us
        pass
    raise NotFound(f"Task {task_id} has no file {path[:200]!r}; GET /tasks/{task_id}/files lists them.", code="file_not_found")


def explain_delay(errors: Sequence[str]) -> str:
    """Say in one line why folders lag behind and what that means, from the errors in their rows."""
    reason, count = Counter(errors).most_common(1)[0]
    then = "when there is space" if reason.endswith(os.strerror(errno.ENOSPC)) else "when it can be written"
    more = f" ({count} tasks)" if count > 1 else ""
    if not reason.startswith("TRACE_DIR="):
        then = "when the way is free (`tower fsck --repair` clears it)"
    return f"{reason}: results are kept, traces follow {then}{more}."


def is_complete(task: dict[str, Any]) -> bool:
    """Whether the folder tells all there will ever be to tell."""
    return task["status"] in FINAL and task["traced_seq"] >= task["seq"]
