"""The trace actor: the only writer of a task's folder."""

import errno
import logging
import os
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tower import db, log, queries, reminders, trace
from tower.errors import NotFound, Unavailable
from tower.faults import fault
from tower.folder import Folder, TaskFolder, open_folder, remove_empty
from tower.log import Outage
from tower.models import FINAL
from tower.settings import Settings
from tower.trace import ARTIFACTS, EVENTS, INPUT, LOG, OUTPUT

#: How long the lag that was seen last says something about now.
_FRESH_S = 2.0
#: What goes wrong with one folder because of what somebody put or took there; everything else is the disk's, and hits all folders.
_IN_THE_WAY = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.EACCES, errno.EPERM)

_log = logging.getLogger(__name__)


class Tracer:
    """Brings folders up to what their rows say; doing it twice, or at once, changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._root = settings.trace_dir
        self._lag_s, self._seen_at = 0.0, 0.0
        self._outage, self._failed_at = Outage(_log, "traces can be written again"), 0.0
        self._lock = threading.Lock()
        #: Tasks being traced by this process, and those of them that were asked for meanwhile.
        self._in_hand: set[str] = set()
        self._again: set[str] = set()

    @property
    def lag_s(self) -> float:
        """Seconds that the last folder was completed after its task's end; 0 when none was for a while, as when the disk fails."""
        return self._lag_s if time.monotonic() - self._seen_at < _FRESH_S else 0.0

    def trace(self, task_id: str) -> None:
        """Write what the task's folder does not tell yet; a disk that fails delays it and harms nothing else.

        While a thread of this process writes the folder, no other waits for it: that one looks again.
        """
        with self._lock:
            if task_id in self._in_hand:
                self._again.add(task_id)
                return
            self._in_hand.add(task_id)
        try:
            self._try(task_id)
            while self._is_asked_again(task_id):
                self._try(task_id)
        except BaseException:
            with self._lock:
                self._in_hand.discard(task_id)
            raise

    def _is_asked_again(self, task_id: str) -> bool:
        """Whether to go on with a task; if not, it is out of our hands."""
        with self._lock:
            if task_id in self._again:
                self._again.discard(task_id)
                return True
            self._in_hand.discard(task_id)
            return False

    def rebuild(self, task_id: str, into: Path | None = None) -> None:
        """Write a task's folder from its rows alone, in TRACE_DIR or elsewhere; raise NotFound, OSError or Unavailable."""
        db.read(partial(self._write_anew, task_id, into))

    def _try(self, task_id: str) -> None:
        try:
            db.read(partial(self._bring_up, task_id))  # one connection for all that is asked on the way
        except NotFound:
            remove_empty(self._root, task_id)  # deleted meanwhile; looking made a folder
        except BlockingIOError:
            _log.debug("another process writes the folder; the sweep looks after it", extra=log.context(task_id, 0))
        except OSError as error:
            self._note_failure(task_id, error)
        except Unavailable as error:
            _log.warning("%s The trace waits.", error.message, extra=log.context(task_id, 0))

    def _note_failure(self, task_id: str, error: OSError) -> None:
        """Say once what is wrong, in the row and in the process log; the sweep asks for the folder again."""
        why = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
        place = str(error.filename or "")
        is_of_one = error.errno in _IN_THE_WAY and place != str(self._root) and _takes_folders(self._root)
        if is_of_one:
            reason = f"{self._root / task_id / place if place != task_id else self._root / task_id}: {why}"
        else:
            reason = f"TRACE_DIR={self._root}: {why}"
            self._failed_at = time.monotonic()
            self._outage.begin("%s: results are kept, traces follow when they can be written", reason)
        is_known = db.read(partial(queries.trace_error, task_id)) == reason  # a disk that fails must not make writers wait
        if not is_known and db.unit(partial(reminders.trace_failed, task_id, reason)) and is_of_one:
            _log.warning("the trace could not be written; it will be tried again: %s", reason, extra=log.context(task_id, 0))

    def _bring_up(self, task_id: str) -> None:
        with open_folder(self._root, task_id) as folder:
            task = _row(folder, task_id)
            if task["traced_seq"] >= task["seq"] and not _is_whole(folder, task):
                db.unit(partial(reminders.untraced, task_id))
                task |= {"traced_seq": 0, "traced_bytes": 0}
            if task["traced_seq"] < task["seq"]:
                self._catch_up(folder, task)

    def _catch_up(self, folder: TaskFolder, task: dict[str, Any]) -> None:
        fault("trace.before_write")
        if not folder.has(INPUT):
            folder.replace(INPUT, trace.render_input(task).encode())
        size = _extend_log(folder, task)
        _write_rest(folder, task)
        self._mark(task, size)
        # A full disk takes small folders between large ones: it is over for one that failed, or when none has failed for long.
        if task["trace_error"] or time.monotonic() - self._failed_at > reminders.TRACE_CEILING_S:
            self._outage.end()
        if task["status"] in FINAL and not task["trace_error"]:  # else it says nothing about our pace
            self._lag_s, self._seen_at = db.clock() - task["finished_at"], time.monotonic()

    def _write_anew(self, task_id: str, into: Path | None) -> None:
        with open_folder(into or self._root, task_id) as folder:
            task = _row(folder, task_id)
            for name in folder.names():
                if name.startswith(".") and name.endswith(".new"):
                    folder.remove(name)
            folder.replace(INPUT, trace.render_input(task).encode())
            size = folder.replace(LOG, trace.log_pieces(task, 0))
            _write_rest(folder, task)
            if into is None:
                self._mark(task, size)

    def _mark(self, task: dict[str, Any], size: int) -> None:
        fault("trace.before_mark")
        db.unit(lambda: reminders.traced(task["id"], task["seq"], size))


def _takes_folders(root: Path) -> bool:
    return root.is_dir() and os.access(root, os.W_OK | os.X_OK)


def _row(folder: TaskFolder, task_id: str) -> dict[str, Any]:
    try:
        return queries.task(task_id)
    except NotFound:
        folder.drop_if_empty()  # we have just made it
        raise


def _is_whole(folder: Folder, task: dict[str, Any]) -> bool:
    """Whether every file is there that should be, as long as it should be."""
    if folder.size(LOG) != task["traced_bytes"] or not (folder.has(INPUT) and folder.has(EVENTS)):
        return False
    if task["status"] not in FINAL:
        return True
    kept = db.read(lambda: queries.artifacts(task["id"]))
    return folder.has(OUTPUT) and all(folder.size(f"{ARTIFACTS}/{name}") is not None for name, _ in kept)


def _extend_log(folder: Folder, task: dict[str, Any]) -> int:
    """Append what is new to log.txt, or write all of it if it was taken away or cut; return its size."""
    size = int(task["traced_bytes"])
    if not folder.append(LOG, size, b""):
        return folder.replace(LOG, trace.log_pieces(task, 0))
    for piece in trace.log_pieces(task, task["traced_seq"]):
        if not folder.append(LOG, size, piece):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), LOG)  # taken away at this moment
        size += len(piece)
    return size


def _write_rest(folder: TaskFolder, task: dict[str, Any]) -> None:
    """Write everything but input.json and log.txt; output.json last, and only at the end."""
    events = [event for event in db.read(lambda: queries.events(task["id"])) if event["seq"] <= task["seq"]]
    folder.replace(EVENTS, trace.render_events(events).encode())
    if task["status"] in FINAL:
        _write_artifacts(folder, task["id"])
        folder.replace(OUTPUT, trace.render_output(task, events).encode())
    else:
        folder.remove(OUTPUT)  # of a database that was restored from before the end
    folder.settle()
    folder.check_place()


def _write_artifacts(folder: Folder, task_id: str) -> None:
    kept = db.read(lambda: queries.artifacts(task_id))
    if not kept:
        return
    with folder.inner(ARTIFACTS) as inside:
        for name, parts in kept:
            _write_inside(inside, name.split("/"), trace.artifact_parts(task_id, name, parts))
        inside.settle()


def _write_inside(folder: Folder, path: list[str], parts: Iterable[bytes]) -> None:
    if len(path) == 1:
        folder.replace(path[0], parts)
        return
    with folder.inner(path[0]) as inside:
        _write_inside(inside, path[1:], parts)
