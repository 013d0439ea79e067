"""The body shared by all handler actors: claim, run, finish, and on to the next."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from actors import handling
from actors.attempt import LEASE_LOST, SHUTDOWN, UNGUARDED, Attempt
from actors.batch import Batch, Done, Tempo, Watch
from actors.desk import Answer, Desk
from actors.walk import Walk
from actors.worker import WorkerProcess
from tower import db, lifecycle, log, queries
from tower.broker import ORCHESTRATE, TRACE, Nudger
from tower.errands import Threads
from tower.errors import Unavailable
from tower.faults import fault
from tower.handler import Registry
from tower.lifecycle import Ending, Outcome
from tower.models import new_id
from tower.reminders import Nudge
from tower.settings import Settings
from tower.terms import SUCCEEDED

#: A folder should be complete a second after its task's end: from this lag on slots wait a moment before their next task.
_LATE_S, _PAUSE_S = 0.3, 1.0

#: What is said of a task that its worker cannot go on with.
_HANDED_BACK = {
    SHUTDOWN: "its worker was stopped",
    LEASE_LOST: "its worker could not renew its lease",
    UNGUARDED: "its worker could not guard its processes",
}

#: Stands for the status of an attempt of which it was told already that it could not be recorded.
_TOLD = ""

_log = logging.getLogger(__name__)


class Runner:
    """Runs tasks in the slots of one worker process."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        nudger: Nudger,
        worker: WorkerProcess,
        run_pass: Callable[[], object],
        write_trace: Callable[[str], None] | None = None,
        trace_lag: Callable[[], float] = float,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._nudger = nudger
        self._worker = worker
        self._run_pass = run_pass
        self._write_trace = write_trace
        self._trace_lag = trace_lag
        self._threads = Threads("slot")
        self._tempo = Tempo()
        self._desk = Desk(settings, worker, self._tempo.is_quick)
        self._watch = Watch(self._begin)

    def handle(self) -> None:
        """Answer a nudge: give free slots what was dispatched, whatever task it names."""
        if self._worker.free_slots:
            self.fill()
        else:
            self._desk.is_behind = True

    def offer(self, nudges: Sequence[Nudge]) -> list[Nudge]:
        """Give tasks that were dispatched to free slots of this process; return those for which there are none."""
        ours = [nudge for nudge in nudges if nudge.queue in self._worker.queues]
        slots = self._worker.take_slots(len(ours))
        if slots < len(ours):
            self._desk.is_behind = True
        if slots:
            self._start(slots)
        given = set(ours[:slots])
        return [nudge for nudge in nudges if nudge not in given]

    def start(self, walk: Walk, *, keeps: bool) -> int | None:
        """Dispatch and claim what a walk has chosen with one commit, and what it keeps with that of the end that frees a slot for it.

        Returns how many, none if somebody else decided meanwhile. Returns None if they have to be dispatched first: because they may
        find a free slot at another worker, or because the slots here are for what was dispatched before.
        """
        ours = set(self._worker.queues)
        if not walk.queues <= ours or walk.load.unclaimed & ours:
            return None
        keeps = keeps and self.would_keep(walk)
        slots = self._worker.take_slots(len(walk.chosen), all_or_none=not keeps)
        if not slots and not keeps:
            return None
        choice = self._desk.keep(walk.chosen, walk.load.token, walk.places)
        began = self._start(slots) if slots else 0
        if not keeps and self._desk.kept:  # somebody else had his turn
            self.recall()
        return min(began + self._desk.kept, len(walk.chosen)) if self._desk.holds(choice) else 0

    def has_plenty(self) -> bool:
        """Whether every slot is busy and has a task kept for it: then another pass is not needed soon."""
        return self._desk.kept >= self._worker.slots and not self._worker.free_slots

    def would_keep(self, walk: Walk) -> bool:
        """Whether what has to be dispatched now would be kept, if nothing that was dispatched before waited for a slot."""
        return walk.queues <= set(self._worker.queues) and walk.load.workers == {self._worker.id} and not self._worker.stopping

    def recall(self) -> None:
        """Start no more of what was kept: another pass chooses anew."""
        self._desk.keep((), 0)

    def take_turnover(self) -> float:
        """Return how many short tasks a slot has ended, on average, since this was asked last."""
        return self._tempo.take_short() / max(1, self._worker.slots)

    def look(self) -> None:
        """Start what may start, without any nudge: so work goes on when the broker does not."""
        self._run_pass()
        self.fill()

    def fill(self) -> None:
        """Give free slots what is kept for them, and what was dispatched for them or while none was free."""
        if not self._worker.free_slots:
            return
        dispatched = db.read(lambda: queries.dispatched_count(self._worker.queues), in_turn=True)
        waiting = dispatched + self._desk.kept
        slots = self._worker.take_slots(waiting)
        if dispatched and slots < waiting:
            self._desk.is_behind = True
        if slots:
            self._start(slots)

    def _start_kept(self) -> None:
        """Give free slots what is kept for them."""
        slots = self._worker.take_slots(self._desk.kept) if self._desk.kept else 0
        if slots:
            self._start(slots)

    def _start(self, slots: int) -> int:
        """Claim, with one commit, a task for each of these slots, which are taken, and run them; return how many there were."""
        answer = Answer()
        try:
            answer = self._desk.claim(slots)
        finally:
            self._worker.give_slots(slots - len(answer.claims))
        for batch in self._tempo.batches(answer.claims, answer.leased_at):
            self._begin(batch)
        if len(answer.claims) < slots and self._desk.is_behind:  # somebody found no slot meanwhile
            self.fill()
        return len(answer.claims)

    def _begin(self, batch: Batch) -> None:
        try:
            self._threads.run(partial(self._use, batch))
        except RuntimeError as error:  # the system has no more threads
            _log.error("%s: tasks that were claimed wait for the end of their leases", error)
            self._worker.give_slots(batch.slots)

    def _use(self, batch: Batch) -> None:
        """Run a batch and what is claimed with its slots after it, until there is no more."""
        try:
            following = self._run(batch)
            while following:
                for other in following[1:]:
                    self._begin(other)
                following = self._run(following[0])
        except Unavailable as error:
            _log.warning("%s The slot waits for a nudge.", error.message)

    def _run(self, batch: Batch) -> list[Batch]:
        """Run the tasks of a batch and record their ends; return the next batches, and give back the slots that they do not need."""
        last, answer = None, Answer()
        try:
            done = self._perform(batch)
            if done:  # else the watch has taken them away
                last = done[-1].attempt.id
                answer = self._record(done, batch.slots if self._goes_on else 0)
            if last and not answer.claims and self._late_s > 0 and not self._worker.stopping:
                self._ask_for_more(last)
                time.sleep(min(self._late_s, _PAUSE_S))
                if not self._worker.stopping:
                    answer = self._desk.record((), batch.slots)
        finally:
            self._worker.give_slots(batch.slots - len(answer.claims))
            # Only now: it looks for what found no slot while these were not free.
            if last:
                self._ask_for_more(last)
        if not answer.claims and self._goes_on:  # a pass has chosen while the end was recorded
            self._start_kept()
        return self._tempo.batches(answer.claims, answer.leased_at)

    def _perform(self, batch: Batch) -> list[Done]:
        with self._watch.over(batch):
            while claim := batch.next():
                with Attempt(claim, self._settings, self._worker.guard) as attempt:
                    self._worker.add(attempt, batch.leased_at)
                    goes_on = not self._worker.stopping and attempt.stop_reason not in _HANDED_BACK
                    batch.end(attempt, self._timed(attempt) if goes_on else None)
            return batch.take_done()

    def _timed(self, attempt: Attempt) -> Outcome:
        began = time.monotonic()
        outcome = handling.perform(attempt, self._registry, self._settings)
        self._tempo.note(attempt.claim.type, time.monotonic() - began)
        return outcome

    @property
    def _goes_on(self) -> bool:
        """Whether the next tasks are taken with the same commit that records the end of the last."""
        return self._desk.has_more and not self._worker.stopping and self._late_s <= 0

    @property
    def _late_s(self) -> float:
        """How long slots should wait before their next tasks, so that short ones do not outrun their traces for ever."""
        return self._trace_lag() - _LATE_S

    def abandon(self, attempt: Attempt) -> None:
        """Record the end of an attempt whose handler does not end; its slot stays taken until it does."""
        claim = attempt.claim
        outcome = handling.given_up(attempt)
        attempt.log("── the handler does not end; its worker has given it up, and a slot with it until it does")
        _log.error(
            "a handler ignores its end: its slot is lost until it returns", extra=log.context(claim.id, claim.attempt, type=claim.type)
        )
        self._record([Done(attempt, outcome)])
        self._ask_for_more(claim.id)

    def _record(self, done: Sequence[Done], takes: int = 0) -> Answer:
        """Record the ends of attempts, patiently, since while their leases last nobody else will, and take so many tasks.

        As long as no beat comes through either, the database is away for everybody: then it is waited for.
        """
        back = list(filter(_is_handed_back, done))
        ended = [one for one in done if one not in back]
        answer = Answer()
        try:
            with self._patience(ended):
                answer = self._written(ended, takes)
            self._conclude(zip(ended, answer.statuses, strict=False))  # none, if the database was away for too long
            for one in back:
                with self._patience([one]):
                    self._conclude([(one, self._hand_back(one))])
        finally:
            for one in done:
                self._worker.remove(one.attempt)
        return answer

    @contextmanager
    def _patience(self, done: Sequence[Done]) -> Iterator[None]:
        """Say of tasks what becomes of them if their end could not be recorded."""
        try:
            yield
        except Unavailable as error:
            for one in done:
                claim = one.attempt.claim
                _log.warning("%s The task will be taken back and run again.", error.message, extra=log.context(claim.id, claim.attempt))

    def _written(self, done: Sequence[Done], takes: int) -> Answer:
        token = new_id()
        endings = [Ending(one.attempt.claim, one.outcome, token, one.attempt.take_tail()) for one in done if one.outcome]
        if not endings and not takes:
            return Answer()
        try:
            return self._desk.record(endings, takes)
        except Unavailable:
            raise
        except Exception:
            if len(endings) < 2:
                raise
            _log.exception("ends that could not be recorded together are recorded one by one")
            return Answer([self._alone(ending) for ending in endings])

    def _alone(self, ending: Ending) -> str | None:
        try:
            return self._desk.record([ending]).statuses[0]
        except Exception:
            _log.exception("the end could not be recorded", extra=log.context(ending.claim.id, ending.claim.attempt))
            return _TOLD

    def _conclude(self, ends: Iterable[tuple[Done, str | None]]) -> None:
        """Have the folders of tasks told how they ended, and say of which that is not recorded."""
        recorded = []
        for one, status in ends:
            claim = one.attempt.claim
            if status is None:
                _log.warning("the lease was lost; what the attempt did is not recorded", extra=log.context(claim.id, claim.attempt))
            elif status != _TOLD:
                recorded.append(claim.id)
        if recorded and not self._nudger.send(TRACE, *recorded) and self._write_trace:
            for task_id in recorded:  # those too that could be sent: to write a folder twice changes nothing
                self._write_trace(task_id)

    def _hand_back(self, done: Done) -> str | None:
        claim, token, tail = done.attempt.claim, new_id(), done.attempt.take_tail()
        fault("finish.before")
        reason = _HANDED_BACK.get(done.attempt.stop_reason or SHUTDOWN, _HANDED_BACK[SHUTDOWN])
        end = partial(lifecycle.release, claim, reason, token, tail, has_run=done.outcome is not None)
        recognise = partial(lifecycle.finished, claim.id, token)
        status = db.unit(end, patience_s=self._settings.lease_s, recognise=recognise, insists=self._worker.is_cut_off)
        fault("finish.after_commit")
        return status

    def _ask_for_more(self, task_id: str) -> None:
        """Have the orchestrator actor start what may start now that this task has ended."""
        if self._nudger.send(ORCHESTRATE, task_id) or self._worker.stopping:
            return
        try:
            self.look()
        except Unavailable as error:
            _log.warning("%s The sweep asks again.", error.message)


def _is_handed_back(done: Done) -> bool:
    """Whether a task has to run again because of its worker, and not of what its handler did."""
    return done.outcome is None or (done.attempt.stop_reason in _HANDED_BACK and done.outcome.status != SUCCEEDED)
