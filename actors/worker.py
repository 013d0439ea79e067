"""The worker process: its slots, its heartbeat, its row, and the look into the database when no nudge comes."""

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from actors.attempt import CANCEL, LEASE_LOST, SHUTDOWN, UNGUARDED, Attempt
from actors.guard import Guard
from tower import __version__, db, leases, lifeline, queries
from tower.broker import TRACE, Nudger
from tower.errors import Unavailable
from tower.faults import fault
from tower.host import hostname, lease_time, this_process
from tower.models import Worker, new_id
from tower.settings import Settings

#: How often the pulse looks at what runs, and, when nothing does, at the time.
_TICK_S, _IDLE_TICK_S = 0.1, 0.25
_FLUSH_S = 1.0
_ROW_S = 5.0
#: A beat that failed in the last so many seconds, at least, says that the database was away; there are several in that time.
_LATELY_S = 15.0
_LOOK_S = 2.0

_log = logging.getLogger(__name__)


class WorkerProcess:
    """One incarnation: it holds leases while it beats, and stops its own work when it cannot."""

    def __init__(self, settings: Settings, nudger: Nudger, *, slots: int, queues: Sequence[str]) -> None:
        self.id = new_id()
        self._parent = None if settings.embedded else os.getppid()
        self.queues = list(queues)
        self._settings = settings
        self._nudger = nudger
        self.slots = slots
        self._attempts: dict[tuple[str, int], Attempt] = {}
        #: Those that the last beat was for.
        self._beaten = set[tuple[str, int]]()
        #: When a beat failed last.
        self._missed_at = -math.inf
        self._busy = 0
        self._grace_over = False
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._pulse: threading.Thread | None = None
        self._last_nudge = 0.0
        #: What its child processes are told to.
        self.guard = Guard(embedded=settings.embedded, when_lost=partial(self._stop_all, UNGUARDED))
        self._lifeline: int | None = None

    def start(self, look: Callable[[], None], due_s: Callable[[], float], abandon: Callable[[Attempt], None]) -> None:
        """Start the pulse, which makes the worker known.

        `look` is called when slots are free and no nudge comes, or in so many seconds as `due_s` says; `abandon` for an attempt whose
        handler ignores its end.
        """
        self._lifeline = lifeline.hold(lifeline.folder(self._settings.run_dir), self.id)
        self.guard.start(self._lifeline)
        self._pulse = threading.Thread(target=self._run_pulse, args=(look, due_s, abandon), name="pulse", daemon=True)
        self._pulse.start()
        _log.info("worker started", extra={"fields": {"worker": self.id, "slots": self.slots, "queues": ",".join(self.queues)}})

    def take_no_more(self) -> None:
        """Take no more tasks; `stop` does the rest."""
        self._stopping.set()

    def stop(self, grace_s: float) -> None:
        """Take no more tasks, let the running ones go on for a while, then hand them back to the queue."""
        self._stopping.set()
        self._try(Worker.update(slots=0).where(Worker.id == self.id))  # what is handed back must not be dispatched to us
        if not self._wait_until_idle(grace_s):
            with self._lock:
                self._grace_over = True
            self._stop_all(SHUTDOWN)
            self._wait_until_idle(10.0)
        if self._pulse:
            self._pulse.join(timeout=5)
        self._try(Worker.delete().where(Worker.id == self.id))
        self.guard.stop()
        lifeline.drop(lifeline.folder(self._settings.run_dir), self.id, self._lifeline)
        _log.info("worker stopped", extra={"fields": {"worker": self.id}})

    def _stop_all(self, reason: str) -> None:
        for attempt in self.attempts():
            attempt.stop(reason)

    def _try(self, query: Any) -> None:
        try:
            db.unit(query.execute, patience_s=2)
        except Unavailable as error:
            _log.warning("%s The worker's row stays until a sweep forgets it.", error.message)

    def _wait_until_idle(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._busy:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    @property
    def free_slots(self) -> int:
        """How many more tasks it can take."""
        return 0 if self._stopping.is_set() or not self.guard.is_up else self.slots - self._busy

    def take_slots(self, wanted: int, *, all_or_none: bool = False) -> int:
        """Take so many slots, or those that are free; return how many."""
        with self._lock:
            taken = max(0, min(wanted, self.free_slots))
            if all_or_none and taken < wanted:
                return 0
            self._busy += taken
        if taken:
            self._last_nudge = time.monotonic()
        return taken

    def give_slots(self, count: int) -> None:
        """Give slots back."""
        with self._lock:
            self._busy -= count

    @property
    def stopping(self) -> bool:
        """Whether no more tasks are taken."""
        return self._stopping.is_set()

    def is_cut_off(self) -> bool:
        """Whether the database was away lately, and this worker is not about to stop: it was so for others too, or they have its tasks."""
        return not self.stopping and time.monotonic() - self._missed_at < max(self._settings.lease_s, _LATELY_S)

    def add(self, attempt: Attempt, leased_at: float) -> None:
        """Beat for an attempt from now on; `leased_at` is the time, on the leases' clock, before the claim was sent."""
        attempt.trust(leased_at)
        with self._lock:
            self._attempts[attempt.id, attempt.attempt] = attempt
            if self._grace_over:
                attempt.stop(SHUTDOWN)

    def remove(self, attempt: Attempt) -> None:
        """Beat for it no more."""
        with self._lock:
            self._attempts.pop((attempt.id, attempt.attempt), None)

    def attempts(self) -> list[Attempt]:
        """Return what runs now."""
        with self._lock:
            return list(self._attempts.values())

    def _run_pulse(self, look: Callable[[], None], due_s: Callable[[], float], abandon: Callable[[Attempt], None]) -> None:
        next_beat = next_flush = next_row = next_look = 0.0
        idle_tick_s = min(_IDLE_TICK_S, self._settings.beat_s / 2)  # what begins meanwhile must not miss its first beat
        while not self._stopping.wait(max(0.0, min(_TICK_S if self._busy else idle_tick_s, due_s()))) or self._busy:
            if self._stopping.is_set():
                time.sleep(_TICK_S)
            now = time.monotonic()
            self._follow_parent()
            try:
                if now >= next_beat:
                    next_beat = now + self._settings.beat_s
                    self._beat()
                # To try for each attempt what has just failed would hold up the next beat.
                if now >= next_flush and now - self._missed_at > self._settings.beat_s:
                    next_flush = now + _FLUSH_S
                    self._flush()
                    self._abandon(abandon)
                if now >= next_row:
                    next_row = now + min(_ROW_S, self._settings.lease_s / 4)
                    self._write_row()
                if now >= next_look and now - self._last_nudge > _LOOK_S and not self._stopping.is_set():
                    next_look = now + _LOOK_S
                    if self._something_waits():
                        look()
                elif due_s() <= 0 and not self._stopping.is_set():
                    look()
            except Unavailable:
                pass  # `db` has said so
            except Exception:
                _log.exception("the worker's pulse missed a beat; the next one comes")

    def _follow_parent(self) -> None:
        """Stop when the process that started us is gone: nobody else could stop us, and its next life starts workers of its own."""
        if self._parent is not None and os.getppid() != self._parent:
            self._parent = None
            _log.warning("the process that started this worker is gone; the worker stops")
            os.kill(os.getpid(), signal.SIGTERM)

    def _beat(self) -> None:
        """Renew all leases with one statement; stop what was cancelled, and what is ours no more."""
        with self._lock:
            held = dict(self._attempts)
        if not held:
            return
        sent, ids = lease_time(embedded=self._settings.embedded), [task_id for task_id, _ in held]
        fault("beat.before")
        # A database that does not answer needs no further word: no attempt trusts its lease longer than was last renewed.
        # What began since the last one may not have been waited for: it counts from now on, also if it takes the machine down.
        # Postgres, unlike SQLite, could end by itself and take a beat with it that was trusted already.
        is_promise = db.is_postgres() or not self._beaten.issuperset(held)
        try:
            kept = db.unit(
                lambda: leases.heartbeat(self.id, ids), patience_s=self._settings.beat_s, is_promise=is_promise, sees_arrived=False
            )
        except Unavailable:
            self._missed_at = time.monotonic()
            raise
        self._beaten = set(held)
        for key, attempt in held.items():
            if key not in kept:
                attempt.stop(LEASE_LOST)
                continue
            attempt.trust(sent)
            if kept[key]:
                attempt.stop(CANCEL)

    def _flush(self) -> None:
        for attempt in self.attempts():
            if attempt.flush():
                self._nudger.send(TRACE, attempt.id)

    def _abandon(self, abandon: Callable[[Attempt], None]) -> None:
        for attempt in self.attempts():
            if attempt.ignores_its_end:
                self.remove(attempt)
                abandon(attempt)

    def _write_row(self) -> None:
        me = this_process()
        row = {"host": hostname(), "pid": me.pid, "pid_space": me.space, "pid_started": me.started}
        row |= {
            "slots": 0 if self._stopping.is_set() else self.slots,
            "queues": json.dumps(self.queues),
            "version": __version__,
            "started_at": db.now(),
            "beat_at": db.now(),
        }
        query = Worker.insert(id=self.id, **row).on_conflict(conflict_target=[Worker.id], update={Worker.beat_at: db.now()})
        db.unit(query.execute, patience_s=2, is_promise=False)

    def _something_waits(self) -> bool:
        return db.read(lambda: queries.is_anything_to_do(self.queues), patience_s=2)
