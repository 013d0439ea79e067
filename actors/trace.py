"""The trace actor: the only writer of a task's folder."""

import errno
import logging
import os
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

from actors import whole
from actors.scribe import Scribe
from actors.whole import Mark
from tower import db, log, queries, reminders, trace
from tower.errors import Unavailable
from tower.faults import fault
from tower.folder import Folder, TaskFolder, open_folder
from tower.host import boot_id
from tower.log import Outage
from tower.queries import Told
from tower.settings import Settings
from tower.terms import FINAL
from tower.trace import ARTIFACTS, EVENTS, INPUT, LOG, OUTPUT

#: How long the lag that was seen last says something about now.
_FRESH_S = 2.0
#: Holds which start of the machine the folders were written in.
_BOOT = ".boot"
#: Threads of a process that write at once, since one with a large log must not keep the others waiting; folders that each takes together.
_WRITERS, TOGETHER = 3, 64
#: What goes wrong with one folder because of what somebody put or took there; everything else is the disk's, and hits all folders.
_IN_THE_WAY = (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.EACCES, errno.EPERM)

_log = logging.getLogger(__name__)


class Tracer:
    """Brings folders up to what their rows say; doing it twice, or at once, changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._root = settings.trace_dir
        self._scribe = Scribe(settings)
        self._lag_s, self._seen_at = 0.0, 0.0
        self._outage, self._failed_at = Outage(_log, "traces can be written again"), 0.0
        self._lock = threading.Lock()
        #: Tasks that were asked for, in order, and those of them that a thread of this process has in hand.
        self._asked: dict[str, None] = {}
        self._in_hand: set[str] = set()
        self._writers = 0

    @property
    def lag_s(self) -> float:
        """Seconds that the last folder was completed after its task's end; 0 when none was for a while, as when the disk fails."""
        return self._lag_s if time.monotonic() - self._seen_at < _FRESH_S else 0.0

    def trace(self, task_id: str) -> None:
        """Write what the task's folder does not tell yet; a disk that fails delays it and harms nothing else.

        Returns at once when other threads of this process are at it: they take what was asked for meanwhile, several tasks together.
        """
        self.trace_all([task_id])

    def trace_all(self, ids: Iterable[str]) -> None:
        """Write what the folders of several tasks do not tell yet; see `trace`."""
        with self._lock:
            self._asked.update(dict.fromkeys(ids))
            if self._writers == _WRITERS or not self._next():
                return
            self._writers += 1
        try:
            while taken := self._take():
                try:
                    self._try(taken)
                finally:
                    self._put_back(taken)
        finally:
            with self._lock:
                self._writers -= 1

    def _next(self) -> list[str]:
        """Return what to write next; what another thread has in hand comes after that."""
        return list(islice((task_id for task_id in self._asked if task_id not in self._in_hand), TOGETHER))

    def _take(self) -> list[str]:
        with self._lock:
            taken = sorted(self._next())  # so that two processes that lock the same folders do not wait for each other in a circle
            for task_id in taken:
                del self._asked[task_id]
            self._in_hand.update(taken)
            return taken

    def _put_back(self, taken: list[str]) -> None:
        with self._lock:
            self._in_hand.difference_update(taken)

    def stop(self) -> None:
        """End what was started to write more at once."""
        self._scribe.stop()

    def follow_power_cut(self) -> None:
        """After a start of the machine, write the last folders again: the disk may not have had them yet when it went down."""
        mark = self._root / _BOOT
        try:
            if mark.exists() and mark.read_text() == boot_id():
                return
            db.unit(reminders.untraced_lately)
            self._root.mkdir(parents=True, exist_ok=True)
            mark.write_text(boot_id())
        except OSError as error:  # told by the first trace
            _log.debug("%s: %s", mark, error)

    def rebuild(self, task_id: str, into: Path | None = None) -> None:
        """Write a task's folder from its rows alone, in TRACE_DIR or elsewhere; raise NotFound, OSError or Unavailable."""
        db.read(partial(self._write_anew, task_id, into))

    def _try(self, ids: list[str]) -> None:
        try:
            made = self._scribe.make(ids)
            db.read(partial(self._bring_up, ids, made), sees_arrived=False)  # one connection for all that is asked on the way
        except Unavailable as error:
            _log.warning("%s %d traces wait.", error.message, len(ids))

    def _bring_up(self, ids: list[str], made: dict[str, Mark]) -> None:
        marks = {**made, **whole.make(self._root, [task_id for task_id in ids if task_id not in made])}
        left = [task_id for task_id in ids if task_id not in marks]
        with ExitStack() as stack:
            folders = {task_id: folder for task_id in left if (folder := self._opened(stack, task_id))}
            told = queries.to_trace(list(folders))  # once they are locked: nobody else can have written what we read
            marks |= {task_id: mark for task_id, folder in folders.items() if (mark := self._written(folder, task_id, told.get(task_id)))}
            if marks:
                fault("trace.before_mark")
                told_up_to = [(task_id, mark.seq, mark.log_size) for task_id, mark in marks.items()]
                db.unit(partial(reminders.traced, told_up_to), is_one_statement=True, is_promise=False)
                self._note_pace(marks.values())

    def _opened(self, stack: ExitStack, task_id: str) -> TaskFolder | None:
        try:
            return stack.enter_context(open_folder(self._root, task_id))
        except BlockingIOError:
            _log.debug("another process writes the folder; the sweep looks after it", extra=log.context(task_id, 0))
        except OSError as error:
            self._note_failure(task_id, error)
        return None

    def _written(self, folder: TaskFolder, task_id: str, told: Told | None) -> Mark | None:
        """Bring one folder up; return what it tells now, if that is news."""
        if told is None:
            folder.drop_if_empty()  # deleted meanwhile; looking made a folder
            return None
        task = told["task"]
        try:
            if task["traced_seq"] >= task["seq"]:
                if _is_whole(folder, told):
                    return None
                db.unit(partial(reminders.untraced, task_id))
                told = queries.to_trace([task_id])[task_id]
            return whole.mark(told["task"], self._catch_up(folder, told))
        except OSError as error:
            self._note_failure(task_id, error)
            return None

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

    def _catch_up(self, folder: TaskFolder, told: Told) -> int:
        fault("trace.before_write")
        task = told["task"]
        if not folder.has(INPUT):
            folder.replace(INPUT, trace.render_input(task).encode())
        size = _extend_log(folder, told)
        _write_rest(folder, told)
        return size

    def _note_pace(self, marks: Collection[Mark]) -> None:
        # A full disk takes small folders between large ones: it is over for one that failed, or when none has failed for long.
        if any(mark.trace_error for mark in marks) or time.monotonic() - self._failed_at > reminders.TRACE_CEILING_S:
            self._outage.end()
        # What follows an outage says nothing about our pace.
        ends = [mark.ended_at for mark in marks if mark.ended_at is not None and not mark.trace_error]
        if ends:
            self._lag_s, self._seen_at = db.clock() - min(ends), time.monotonic()

    def _write_anew(self, task_id: str, into: Path | None) -> None:
        with open_folder(into or self._root, task_id) as folder:
            told = queries.to_trace([task_id]).get(task_id)
            if told is None:
                folder.drop_if_empty()  # we have just made it
                raise queries.missing(task_id)
            for name in folder.names():
                if name.startswith(".") and name.endswith(".new"):
                    folder.remove(name)
            task = told["task"]
            folder.replace(INPUT, trace.render_input(task).encode())
            size = folder.replace(LOG, trace.log_pieces(task, 0))
            _write_rest(folder, told)
            if into is None:
                fault("trace.before_mark")
                db.unit(partial(reminders.traced, [(task_id, task["seq"], size)]))


def _takes_folders(root: Path) -> bool:
    return root.is_dir() and os.access(root, os.W_OK | os.X_OK)


def _is_whole(folder: Folder, told: Told) -> bool:
    """Whether every file is there that should be, as long as it should be."""
    task = told["task"]
    if folder.size(LOG) != task["traced_bytes"] or not (folder.has(INPUT) and folder.has(EVENTS)):
        return False
    if task["status"] not in FINAL:
        return True
    return folder.has(OUTPUT) and all(folder.size(f"{ARTIFACTS}/{name}") is not None for name, _ in told["artifacts"])


def _extend_log(folder: Folder, told: Told) -> int:
    """Append what is new to log.txt, or write all of it if it was taken away or cut; return its size."""
    task = told["task"]
    if not task["traced_seq"]:
        return folder.replace(LOG, trace.log_pieces(task, 0) if told["news"] is None else [trace.render_log(told["news"]).encode()])
    size = int(task["traced_bytes"])
    if not folder.append(LOG, size, b""):
        return folder.replace(LOG, trace.log_pieces(task, 0))
    pieces = trace.log_pieces(task, task["traced_seq"]) if told["news"] is None else [trace.render_log(told["news"]).encode()]
    for piece in pieces:
        if not folder.append(LOG, size, piece):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), LOG)  # taken away at this moment
        size += len(piece)
    return size


def _write_rest(folder: TaskFolder, told: Told) -> None:
    """Write everything but input.json and log.txt; output.json last, and only at the end."""
    task, events = told["task"], told["events"]
    folder.replace(EVENTS, trace.render_events(events).encode())
    if task["status"] in FINAL:
        _write_artifacts(folder, task["id"], told["artifacts"])
        folder.replace(OUTPUT, trace.render_output(task, events).encode())
    else:
        folder.remove(OUTPUT)  # of a database that was restored from before the end
    folder.check_place()


def _write_artifacts(folder: Folder, task_id: str, kept: list[tuple[str, int]]) -> None:
    if not kept:
        return
    with folder.inner(ARTIFACTS) as inside:
        for name, parts in kept:
            _write_inside(inside, name.split("/"), trace.artifact_parts(task_id, name, parts))


def _write_inside(folder: Folder, path: list[str], parts: Iterable[bytes]) -> None:
    if len(path) == 1:
        folder.replace(path[0], parts)
        return
    with folder.inner(path[0]) as inside:
        _write_inside(inside, path[1:], parts)
