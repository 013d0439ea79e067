"""Retention: removes tasks that ended long ago, with their folder and everything that belongs to them, a few at a time.

The folder goes first and the row last. Whoever is killed in between leaves a row that the next pass finds again, never a folder that
no row knows.
"""

import logging
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

from peewee import Tuple

from tower import audit, db, folder
from tower.faults import fault
from tower.log import Outage
from tower.models import Task, TaskArtifact, TaskLog
from tower.settings import Settings
from tower.terms import CANCELLED, FAILED, SUCCEEDED, TIMED_OUT

#: Tasks removed by one step, and the seconds after which it lets the sweep go on in any case.
_STEP, _STEP_S = 100, 1.0
#: Log chunks, or parts of artifacts, deleted by one transaction: some 16 MB.
_SLICE = 64
#: Seconds between two steps when there is nothing to remove.
_IDLE_S = 60.0
_DAY_S = 86_400.0

_log = logging.getLogger(__name__)


def kept_days(settings: Settings) -> dict[str, float]:
    """Return for how many days a task is kept after its end, by its status; 0 is for ever."""
    return {
        SUCCEEDED: settings.keep_succeeded_days,
        CANCELLED: settings.keep_cancelled_days,
        FAILED: settings.keep_failed_days,
        TIMED_OUT: settings.keep_timed_out_days,
    }


def is_past(task: dict[str, Any], settings: Settings, now: float) -> bool:
    """Return whether a task may be removed at any moment, so that parts of it may be gone already."""
    days = kept_days(settings).get(task["status"], 0)
    return days > 0 and bool(task["finished_at"] < now - days * _DAY_S)


class Retention:
    """Removes what is older than the settings keep; any number of them may run at once."""

    def __init__(self, settings: Settings) -> None:
        self._root = settings.trace_dir
        self._keep = kept_days(settings)
        self._audit_days = settings.keep_audit_days
        self._due_at = 0.0
        #: Tasks whose folder could not be removed just now.
        self._stuck: set[str] = set()
        self._outage = Outage(_log, "old tasks can be removed again")

    def run_if_due(self) -> None:
        """Do a step, at once if the last one left something, else about once a minute."""
        if time.monotonic() < self._due_at:
            return
        try:
            more = self.step()
            self._outage.end()
        except OSError as error:
            self._outage.begin("Old tasks stay: %s cannot be changed: %s.", self._root, error.strerror or type(error).__name__)
            more = False
        self._due_at = 0.0 if more else time.monotonic() + _IDLE_S * random.uniform(0.8, 1.2)

    def step(self) -> bool:
        """Remove up to a hundred tasks, the longest ended first; return whether there may be more."""
        folder.remove_leftovers(self._root)
        until = time.monotonic() + _STEP_S
        ids = db.read(self._ended)
        failed: OSError | None = None
        for task_id in ids:
            try:
                _remove(self._root, task_id)
            except OSError as error:  # its folder stays, and with it the row; others go
                failed = error
                self._stuck.add(task_id)
            if time.monotonic() > until:
                break
        if ids:
            _log.info("tasks that ended long ago were removed", extra={"fields": {"count": len(ids) - len(self._stuck.intersection(ids))}})
        if len(ids) == _STEP:
            return True
        self._stuck.clear()  # to be tried again in a minute
        if self._audit_days and db.read(partial(audit.has_older, self._audit_days)):
            db.unit(partial(audit.forget, self._audit_days))
        if failed:
            raise failed
        return False

    def _ended(self) -> list[str]:
        found: list[str] = []
        for status, days in self._keep.items():
            if days > 0 and len(found) < _STEP:
                old = Task.select(Task.id).where(Task.status == status, Task.finished_at < db.instant() - days * _DAY_S)
                old = old.where(Task.id.not_in(list(self._stuck))) if self._stuck else old
                found += [row[0] for row in old.order_by(Task.finished_at).limit(_STEP - len(found)).tuples()]
        return found


def _remove(root: Path, task_id: str) -> None:
    folder.remove_folder(root, task_id)
    fault("retention.mid")
    for table, columns in ((TaskLog, (TaskLog.seq,)), (TaskArtifact, (TaskArtifact.name, TaskArtifact.part))):
        while db.unit(partial(_delete_slice, table, columns, task_id)) == _SLICE:
            pass
    db.unit(lambda: Task.delete().where(Task.id == task_id).execute())  # its labels and events go with it
    folder.remove_folder(root, task_id)  # a trace may have been written meanwhile


def _delete_slice(table: Any, columns: tuple[Any, ...], task_id: str) -> int:
    some = table.select(*columns).where(table.task_id == task_id).limit(_SLICE)
    return int(table.delete().where(table.task_id == task_id, Tuple(*columns).in_(some)).execute())
