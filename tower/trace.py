"""The trace folder's format: what each file says, how it is written whole, and how it is read back."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tower.errors import FAILURES, NotFound
from tower.models import FINAL

INPUT, LOG, OUTPUT, EVENTS, ARTIFACTS = "input.json", "log.txt", "output.json", "events.jsonl", "artifacts"

#: What the name of a folder begins with while it is being removed.
_GONE = ".gone-"

_AS_ACCEPTED = (
    *("id", "type", "title", "priority", "timeout_s", "silence_s", "max_attempts", "idempotency_key"),
    *("concurrency_key", "concurrency_limit", "rate_key", "rate_limit", "rate_per_s"),
)
_ORIGIN = ("requested_by", "parent_id", "correlation_id", "retry_of")


def rfc3339(at: float | None) -> str | None:
    """Return seconds since the epoch as a UTC time with milliseconds, such as 2031-05-01T08:00:00.000Z."""
    if at is None:
        return None
    # Down to the millisecond, never up: a list of what was created at this time or later begins with the task itself.
    return datetime.fromtimestamp(math.floor(at * 1000) / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def render_input(task: dict[str, Any]) -> str:
    """Return input.json: the task as it was accepted."""
    told = {
        **{name: task[name] for name in _AS_ACCEPTED},
        "not_before": rfc3339(task["not_before"]),
        "expires_at": rfc3339(task["expires_at"]),
        "labels": json.loads(task["labels"]),
        **{name: task[name] for name in _ORIGIN},
        "created_at": rfc3339(task["created_at"]),
        "payload": json.loads(task["payload"]),
    }
    return _document(told)


def render_output(task: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """Return output.json: how the task ended, with every attempt."""
    error = json.loads(task["error"]) if task["error"] and task["status"] != "succeeded" else None
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
        number, data = event["attempt"], json.loads(event["data"])
        if event["kind"] == "started":
            made[number] = {
                "attempt": number,
                "worker": data.get("worker"),
                "started_at": rfc3339(event["at"]),
                "ended_at": None,
                "end": None,
            }
        elif number in made and made[number]["end"] is None and event["kind"] != "cancel_requested":
            made[number].update(ended_at=rfc3339(event["at"]), end=event["kind"])
    return list(made.values())


def render_events(events: Iterable[dict[str, Any]]) -> str:
    """Return events.jsonl: every event, each line carrying the SHA-256 of the line before, so that a cut or change shows."""
    lines, before = [], ""
    for event in events:
        told = {
            "seq": event["seq"],
            "at": rfc3339(event["at"]),
            "attempt": event["attempt"],
            "kind": event["kind"],
            "data": json.loads(event["data"]),
            "previous": before,
        }
        line = json.dumps(told, ensure_ascii=False, separators=(",", ":"))
        before = hashlib.sha256(line.encode()).hexdigest()
        lines.append(line + "\n")
    return "".join(lines)


def log_line(at: float, attempt: int, text: str) -> str:
    """Return one line of log.txt."""
    return f"{rfc3339(at)} [{attempt}] {text}\n"


def render_log(entries: Iterable[dict[str, Any]]) -> str:
    """Return log.txt, or the part of it that these events and log chunks make, in the order given."""
    return "".join(entry["text"] if "text" in entry else _event_line(entry) for entry in entries)


def _event_line(event: dict[str, Any]) -> str:
    data = {name: value for name, value in json.loads(event["data"]).items() if value is not None}
    told = "".join(f" {name}={json.dumps(value, ensure_ascii=False)}" for name, value in data.items())
    return log_line(event["at"], event["attempt"], f"── {event['kind']}{told}")


def _document(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


class Folder:
    """A task's open folder, locked against other writers; nothing in it is ever reached through a symbolic link."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def replace(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Make a file hold exactly this, so that a reader sees the old or the new, never half."""
        parts = [data] if isinstance(data, bytes) else data
        beside = f".{name}.new"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644, dir_fd=self._fd)
        with open(fd, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(fd)
        os.rename(beside, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def append(self, name: str, offset: int, data: bytes) -> bool:
        """Write at a known offset and cut what a crash left behind it; False if the file does not reach that far."""
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644, dir_fd=self._fd)
        with open(fd, "r+b") as file:
            if os.fstat(fd).st_size < offset:
                return False
            file.truncate(offset)
            file.seek(offset)
            file.write(data)
            file.flush()
            os.fsync(fd)
        return True

    def has(self, name: str) -> bool:
        """Whether a regular file of that name is there."""
        try:
            return stat.S_ISREG(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    @contextmanager
    def inner(self, name: str) -> Iterator["Folder"]:
        """Open a folder inside this one, making it if need be."""
        with _open_folder(name, self._fd) as fd:
            yield Folder(fd)

    def settle(self) -> None:
        """Make the names in the folder survive a power cut."""
        os.fsync(self._fd)


@contextmanager
def open_folder(root: Path, task_id: str) -> Iterator[Folder]:
    """Open and lock a task's folder, making it if need be; two writers wait for each other."""
    root.mkdir(parents=True, exist_ok=True)
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _open_folder(task_id, top) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield Folder(fd)
    finally:
        os.close(top)


@contextmanager
def _open_folder(name: str, parent: int) -> Iterator[int]:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        pass
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_folder(root: Path, task_id: str) -> None:
    """Remove a task's folder: out of sight at once, whole, and then piece by piece; what a kill leaves is removed by `remove_leftovers`."""
    try:
        with _locked_folder(root / task_id):
            os.rename(root / task_id, root / f"{_GONE}{task_id}")
    except FileNotFoundError:
        return  # it never had one, or somebody else removes it
    _discard(root / f"{_GONE}{task_id}")


def remove_empty(root: Path, task_id: str) -> None:
    """Remove a task's folder if there is nothing in it."""
    with suppress(OSError):
        os.rmdir(root / task_id)


def remove_leftovers(root: Path) -> None:
    """Remove what is left of folders whose removal was broken off."""
    try:
        with os.scandir(root) as entries:
            left = [entry.path for entry in entries if entry.name.startswith(_GONE)]
    except FileNotFoundError:
        return
    for path in left:
        _discard(Path(path))


@contextmanager
def _locked_folder(path: Path) -> Iterator[None]:
    """Wait for a writer of the folder; whatever else stands in its place has none."""
    if path.is_symlink() or not path.is_dir():
        yield
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _discard(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)  # what cannot be removed now is a leftover for the next pass


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


def is_complete(task: dict[str, Any]) -> bool:
    """Whether the folder tells all there will ever be to tell."""
    return task["status"] in FINAL and task["traced_seq"] >= task["seq"]
