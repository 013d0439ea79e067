"""The trace actor: the only writer of a task's folder."""

import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from tower import db, log, queries, reminders, trace
from tower.errors import NotFound, Unavailable
from tower.models import FINAL
from tower.settings import Settings
from tower.trace import ARTIFACTS, EVENTS, INPUT, LOG, OUTPUT, Folder

#: Log chunks taken at once: a few MB of memory at most.
_BATCH = 16
#: How long the lag that was seen last says something about now.
_FRESH_S = 2.0

_log = logging.getLogger(__name__)


class Tracer:
    """Brings folders up to what their rows say; doing it twice, or at once, changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._root = settings.trace_dir
        self._lag_s, self._seen_at = 0.0, 0.0

    @property
    def lag_s(self) -> float:
        """Seconds that the last folder was completed after its task's end; 0 when none was for a while, as when the disk fails."""
        return self._lag_s if time.monotonic() - self._seen_at < _FRESH_S else 0.0

    def trace(self, task_id: str) -> None:
        """Write what the task's folder does not tell yet; a disk that fails delays it and harms nothing else."""
        try:
            db.read(partial(self._bring_up, task_id))  # one connection for all that is asked on the way
        except NotFound:
            trace.remove_empty(self._root, task_id)  # deleted meanwhile; looking made a folder
        except OSError as error:
            reason = f"{error.filename or self._root}: {error.strerror or type(error).__name__}"
            _log.warning("the trace could not be written; it will be tried again: %s", reason, extra=log.context(task_id, 0))
            db.unit(lambda: reminders.trace_failed(task_id, reason))
        except Unavailable as error:
            _log.warning("%s The trace waits.", error.message, extra=log.context(task_id, 0))

    def _bring_up(self, task_id: str) -> None:
        with trace.open_folder(self._root, task_id) as folder:
            task = queries.task(task_id)
            if task["traced_seq"] < task["seq"]:
                self._catch_up(folder, task)

    def _catch_up(self, folder: Folder, task: dict[str, Any]) -> None:
        if not folder.has(INPUT):
            folder.replace(INPUT, trace.render_input(task).encode())
        size = self._extend_log(folder, task)
        events = [event for event in db.read(lambda: queries.events(task["id"])) if event["seq"] <= task["seq"]]
        folder.replace(EVENTS, trace.render_events(events).encode())
        if task["status"] in FINAL:
            self._write_artifacts(folder, task["id"])
            folder.replace(OUTPUT, trace.render_output(task, events).encode())
        folder.settle()
        db.unit(lambda: reminders.traced(task["id"], task["seq"], size))
        if task["status"] in FINAL:
            self._lag_s, self._seen_at = db.clock() - task["finished_at"], time.monotonic()

    def _extend_log(self, folder: Folder, task: dict[str, Any]) -> int:
        """Append what is new to log.txt, from the start if it was taken away; return its size."""
        after, size = task["traced_seq"], task["traced_bytes"]
        if not folder.append(LOG, size, b""):
            after, size = 0, 0
        while after < task["seq"]:
            entries = db.read(partial(queries.log_entries, task["id"], after, _BATCH))
            entries = [entry for entry in entries if entry["seq"] <= task["seq"]]
            if not entries:
                break
            data = trace.render_log(entries).encode()
            folder.append(LOG, size, data)
            after, size = entries[-1]["seq"], size + len(data)
        return int(size)

    def _write_artifacts(self, folder: Folder, task_id: str) -> None:
        kept = db.read(lambda: queries.artifacts(task_id))
        if not kept:
            return
        with folder.inner(ARTIFACTS) as inside:
            for name, parts in kept:
                _write_inside(inside, name.split("/"), _parts(task_id, name, parts))
            inside.settle()


def _write_inside(folder: Folder, path: list[str], parts: Iterator[bytes]) -> None:
    if len(path) == 1:
        folder.replace(path[0], parts)
        return
    with folder.inner(path[0]) as inside:
        _write_inside(inside, path[1:], parts)


def _parts(task_id: str, name: str, count: int) -> Iterator[bytes]:
    for part in range(count):
        yield db.read(partial(queries.artifact_part, task_id, name, part))
