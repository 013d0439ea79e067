"""The sweep: a thread in every process that repairs what crashes, lost messages and time leave behind, a bounded piece per pass."""

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from peewee import Tuple

from tower import db, due, lifecycle, lifeline, log, queries, reminders
from tower.broker import ORCHESTRATE, TRACE, Nudger, handler_actor
from tower.due import Look
from tower.errors import Unavailable
from tower.faults import fault
from tower.host import ProcessId, end_marked, hostname, pid_space, remove_attempt_folders
from tower.models import Task, TaskStart, Worker
from tower.retention import Retention
from tower.settings import Settings
from tower.spec import MAX_WINDOW_S
from tower.terms import DISPATCHED, RUNNING

_LIMIT = 200
#: Traces taken per pass while the broker takes no messages, by a process that writes them itself, and by one that cannot.
_WRITTEN, _UNWRITTEN = 20, 1
#: A worker row that has not been renewed for this many leases is forgotten.
_FORGET_LEASES = 4
#: How soon a worker's death on this machine is seen between two passes, and how soon if nothing ran at the first.
_LOOK_S, _IDLE_LOOK_S = 0.25, 1.0
#: A database's clock that falls behind ours by more than this between two passes was set back.
_SET_BACK_S = 1.0

_log = logging.getLogger(__name__)


class Sweep:
    """Runs passes until stopped; any number of sweeps is safe, since every statement compares before it sets."""

    def __init__(self, settings: Settings, nudger: Nudger, write_trace: Callable[[str], None] | None = None) -> None:
        self._settings = settings
        self._nudger = nudger
        self._write_trace = write_trace
        #: Who writes folders also removes them: the others may not even see the disk.
        self._retention = Retention(settings) if write_trace else None
        self._trace_limit = _LIMIT
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        #: (task, attempt, beat) -> since when, on our own clock, we have seen it so.
        self._watched: dict[tuple[str, int, int], float] = {}
        self._last_watch = 0.0
        #: How far the database's clock is ahead of our own; at first it may just have been set back.
        self._ahead_s = math.inf
        #: What the broker's memory was known by last.
        self._epoch: str | None = None
        self._lifelines = lifeline.folder(settings.run_dir)
        #: The workers of this machine, and whether they lived, when we last looked.
        self._seen: dict[str, bool] = {}
        #: Looks that are passes: a worker lets its file go just before the system has done with it.
        self._passes = 0

    def start(self) -> None:
        """Run a pass now and one every TOWER_SWEEP_S in a thread."""
        self._thread = threading.Thread(target=self._loop, name="sweep", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the pass it is in."""
        self._stopping.set()
        if self._thread:
            self._thread.join(timeout=5)

    def _loop(self) -> None:
        pause = 0.0
        while not self._is_stopped(pause):
            try:
                pause = min(self._settings.sweep_s * random.uniform(0.8, 1.2), self.run_once())
            except Unavailable:  # `db` has said so
                pause = self._settings.sweep_s
            except Exception:
                _log.exception("a pass of the sweep failed; the next one tries again")
                pause = self._settings.sweep_s

    def _is_stopped(self, pause: float) -> bool:
        """Wait for the next pass, a shorter time if a worker of this machine ends; return whether there shall be none."""
        end = time.monotonic() + pause
        look_s = _LOOK_S if self._watched else _IDLE_LOOK_S
        while not self._stopping.wait(max(0.0, min(look_s, end - time.monotonic()))):
            before, self._seen = self._seen, lifeline.known(self._lifelines)
            # One that nobody has seen yet may have lived for less than the time between two looks.
            if (_alive(before) | (self._seen.keys() - before.keys())) - _alive(self._seen):
                self._passes = 2
            if self._passes or time.monotonic() >= end:
                self._passes = max(0, self._passes - 1)
                return False
        return True

    def run_once(self) -> float:
        """Do one pass: take back lost leases, end what is late, re-send nudges, ask for traces, forget what is over or long past.

        Returns the seconds until the next task may start or may start no more, so that both are kept to the moment.
        """
        steps: tuple[Callable[[Look], bool], ...] = (
            self._enter,
            self._take_back,
            self._give_up_late,
            self._notice_clock,
            self._notice_forgetful_broker,
            self._wake,
            self._nudge_queued,
            self._nudge_dispatched,
            self._ask_for_traces,
            self._forget_workers,
            self._forget_starts,
            self._tidy_up,
        )
        look = due.look()
        fault("sweep.after_select")
        for step in steps:
            if step(look):
                look = due.look()
        if self._retention:
            self._retention.run_if_due()
        return math.inf if look.next_s is None else max(0.05, look.next_s + 0.01)

    # Each step says whether it changed something, so that those after it look anew.

    def _enter(self, look: Look) -> bool:
        if look.overlooked:
            db.enter_arrived()
        return look.overlooked

    def _take_back(self, look: Look) -> bool:
        """Take tasks from workers that are seen dead, or whose beat we have seen stand still for a whole lease."""
        lost = self._lost(look.running)
        for row in lost:
            try:
                beat = db.unit(partial(lifecycle.fence, row["id"], row["attempt"], row["beat"]))
            except Unavailable:
                self._watched.clear()  # nobody can write: no worker could have renewed its leases
                raise
            if beat is None:
                continue
            fault("sweep.after_fence")
            if not _clear_away(row):
                continue
            moved = db.unit(partial(lifecycle.expire, row["id"], row["attempt"], beat, row["reason"]))
            fault("sweep.after_commit")
            if moved:
                self._nudger.send(ORCHESTRATE, row["id"])
                self._nudger.send(TRACE, row["id"])
        return bool(lost)

    def _lost(self, running: list[dict[str, Any]]) -> list[dict[str, Any]]:
        now = time.monotonic()
        if now - self._last_watch > self._settings.lease_s / 2:
            self._watched.clear()  # we were blind (database down, laptop asleep): what we saw before proves nothing
        self._last_watch = now
        seen = {
            (row["id"], row["attempt"], row["beat"]): self._watched.get((row["id"], row["attempt"], row["beat"]), now) for row in running
        }
        self._watched = seen
        dead: dict[str, bool] = {}
        lost = []
        for row in running:
            worker = row["worker_id"]
            if worker not in dead:
                dead[worker] = row["pid"] is not None and self._is_dead(worker, row)
            if dead[worker]:
                lost.append({**row, "reason": f"Its worker process {row['pid']} on {row['host']} ended."})
            elif now - seen[row["id"], row["attempt"], row["beat"]] >= self._settings.lease_s:
                lost.append({**row, "reason": f"Its worker sent no heartbeat for {self._settings.lease_s:g} s."})
        return lost

    def _is_dead(self, worker_id: str, row: dict[str, Any]) -> bool:
        process = ProcessId(row["pid_space"], row["pid"], row["pid_started"])
        return lifeline.is_dead(self._lifelines, worker_id, process, row["host"])

    def _give_up_late(self, look: Look) -> bool:
        if look.late:
            self._nudger.send(TRACE, *db.unit(lambda: lifecycle.give_up_late(_LIMIT)))
        return look.late

    def _notice_clock(self, look: Look) -> bool:
        """Let nothing wait for a time that was reckoned by a clock which has been set back since."""
        before, self._ahead_s = self._ahead_s, look.ahead_s
        if self._ahead_s >= before - _SET_BACK_S:
            return False
        db.unit(reminders.set_back)
        return True

    def _notice_forgetful_broker(self, look: Look) -> bool:
        """Send every nudge again when the broker was wiped, instead of waiting for each one's time."""
        epoch = self._nudger.epoch()
        if epoch is None or epoch == self._epoch:
            return False
        was_known, self._epoch = self._epoch is not None, epoch
        if was_known:
            _log.warning("the broker has forgotten its messages; they are sent again")
            db.unit(reminders.all_due)
        return was_known

    def _wake(self, look: Look) -> bool:
        """Let tasks start whose time has come, however many have the same."""
        while look.wakes and not self._stopping.is_set() and db.unit(reminders.wake, is_promise=False):
            pass
        return look.wakes

    def _nudge_queued(self, look: Look) -> bool:
        nudge = db.unit(reminders.due_to_start) if look.queued else None
        if nudge:
            self._nudger.send(ORCHESTRATE, nudge.id)
        return False

    def _nudge_dispatched(self, look: Look) -> bool:
        if not look.dispatched:
            return False
        orphans = db.read(lambda: _without_worker(self._settings.lease_s))
        if orphans:
            db.unit(lambda: lifecycle.undeliver(orphans))
        for nudge in db.unit(lambda: reminders.due_to_run(_LIMIT)):
            self._nudger.send(handler_actor(nudge.type), nudge.id)
        return bool(orphans)

    def _ask_for_traces(self, look: Look) -> bool:
        """Ask the trace actor for what lags behind; write it here if the broker takes no messages and this process may."""
        for task_id in db.unit(lambda: reminders.due_to_trace(self._trace_limit)) if look.untraced else ():
            sent = self._nudger.send(TRACE, task_id)
            if not sent and self._write_trace:
                self._write_trace(task_id)
            self._trace_limit = _LIMIT if sent else _WRITTEN if self._write_trace else _UNWRITTEN
        return False

    def _forget_starts(self, look: Look) -> bool:
        """Delete starts that no window reaches back to any more."""
        if look.old_starts:
            old = TaskStart.at < db.instant() - MAX_WINDOW_S
            some = TaskStart.select(TaskStart.rate_key, TaskStart.at, TaskStart.task_id).where(old).limit(_LIMIT)
            columns = Tuple(TaskStart.rate_key, TaskStart.at, TaskStart.task_id)
            db.unit(lambda: TaskStart.delete().where(columns.in_(some)).execute())
        return False

    def _tidy_up(self, look: Look) -> bool:
        """See to it that whoever looks at what has arrived need not go over what has long left."""
        db.tidy_arrivals(look.arrivals_left, look.arrivals_size)
        return False

    def _forget_workers(self, look: Look) -> bool:
        forgotten_s = self._settings.lease_s * _FORGET_LEASES
        dead = [row["id"] for row in look.workers if self._is_dead(row["id"], row)]
        gone = dead + [row["id"] for row in look.workers if look.now - row["beat_at"] > forgotten_s]
        # Its leases are found by the tasks' own rows; only a worker without any is forgotten.
        held = Task.select(Task.worker_id).where(Task.status == RUNNING, Task.worker_id.is_null(False))
        if gone:
            still = (Worker.id << dead) | (Worker.beat_at < db.now() - forgotten_s)  # one that slept may have beaten meanwhile
            forgotten = Worker.delete().where(Worker.id << gone, still, Worker.id.not_in(held)).returning(Worker.id)
            for (worker_id,) in db.unit(lambda: list(forgotten.tuples())):
                lifeline.forget(self._lifelines, worker_id)
        return False


def _clear_away(row: dict[str, Any]) -> bool:
    """End and remove what a lost attempt left on this machine; False if some of it still runs."""
    task_id, attempt = row["id"], row["attempt"]
    if row["pid_space"] == pid_space() and not end_marked(task_id, attempt):
        _log.warning("what a lost worker left cannot be ended, so its task waits", extra=log.context(task_id, attempt))
        return False
    if row["host"] == hostname():
        remove_attempt_folders(task_id, attempt)
    return True


def _without_worker(lease_s: float) -> list[str]:
    """Return dispatched tasks on queues that no live worker serves."""
    served = {queue for worker in queries.live_workers(lease_s) for queue in worker["queues"]}
    rows = Task.select(Task.id, Task.queue).where(Task.status == DISPATCHED).limit(_LIMIT).dicts()
    return [row["id"] for row in rows if row["queue"] not in served]


def _alive(seen: dict[str, bool]) -> set[str]:
    return {worker for worker, lives in seen.items() if lives}
