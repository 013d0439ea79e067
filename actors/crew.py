"""Puts the actors of one process together: declares them on a broker, and starts and stops the worker around them."""

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import dramatiq
from dramatiq.middleware import Middleware

from actors.orchestrator import Dispatcher, NoSlots
from actors.runner import Runner
from actors.trace import TOGETHER, Tracer
from actors.worker import WorkerProcess
from tower import db
from tower.broker import ORCHESTRATE, TRACE, Nudger, handler_actor, take_while
from tower.errands import Errand
from tower.errors import Unavailable
from tower.faults import fault
from tower.handler import Registry
from tower.host import stand_back
from tower.settings import Settings
from tower.sweep import Sweep

#: Threads that answer messages; tasks run in others, so they never hold up decisions and traces.
CONTROL_THREADS = 4
TRACE_QUEUE = "trace"

#: How long a thread may keep the interpreter while others want it. Whoever writes to the database gives it up at each statement and
#: would wait 5 ms, Python's default, to get it back: 62 tasks/s became 93 on SQLite.
_SWITCH_S = 0.001

#: Database connections beside one for each slot: control threads, pulse, sweep.
_SPARE_CONNECTIONS = CONTROL_THREADS + 4

#: Seconds from one pass, or batch of traces, to the next; and under load, where they are further apart since each of them costs. A pass
#: can wait while enough tasks are kept for the slots, and folders no longer than until they fill a batch.
_DECIDE_S, _TRACE_S, _LOADED_S = 0.04, 0.05, 0.12

#: Lower goes first among messages that wait inside a process.
_DECIDE, _TRACE, _HANDLE = 0, 5, 10

_log = logging.getLogger(__name__)


class Crew(Middleware):
    """The actors of this process, and the worker that starts with dramatiq's and stops with it."""

    def __init__(self, settings: Settings, registry: Registry, broker: dramatiq.Broker) -> None:
        self._settings = settings
        self._registry = registry
        self._nudger = Nudger(broker)
        self._dispatcher = Dispatcher(settings, self._nudger)
        self._tracer = Tracer(settings)
        self._runner: Runner | None = None
        self._worker: WorkerProcess | None = None
        self._sweep: Sweep | None = None
        self._is_leaving = False
        #: The actors that this process asks without the broker.
        self._errands: dict[str, Errand] = {}
        self._declare(broker)

    def take_no_more(self) -> None:
        """Take no more tasks, though the process goes on for a while."""
        if self._worker:
            self._worker.take_no_more()

    def write_trace(self, task_id: str) -> None:
        """Write a task's folder in this thread, as the trace actor would."""
        self._tracer.trace(task_id)

    def _declare(self, broker: dramatiq.Broker) -> None:
        _actor(broker, partial(self._do, ORCHESTRATE, self._dispatcher.answer_one), ORCHESTRATE, "orchestrator", _DECIDE)
        _actor(broker, partial(self._do, TRACE, self._tracer.trace), TRACE, TRACE_QUEUE, _TRACE)
        for kind in self._registry:
            _actor(broker, partial(self._handle, handler_actor(kind.name)), handler_actor(kind.name), kind.queue, _HANDLE)

    def _do(self, actor_name: str, act: Callable[[str], None], task_id: str) -> None:
        """Do what a message asks for, with what else is asked of this process."""
        errand = self._errands.get(actor_name)
        if errand:
            errand.ask(task_id)
        else:
            act(task_id)

    def _handle(self, actor_name: str, task_id: str) -> None:
        if self._runner is not None and not self._is_leaving:
            self._runner.handle()
        elif self._is_leaving:
            self._nudger.send(actor_name, task_id)  # for somebody who stays

    def _decide(self, runner: Runner, asked: Sequence[str]) -> None:
        self._dispatcher.answer(asked)
        runner.fill()

    def _can_wait(self) -> bool:
        """Whether nothing would be gained by another pass soon."""
        return self._runner is not None and self._runner.has_plenty() and not self._dispatcher.is_held_up

    def before_worker_boot(self, broker: dramatiq.Broker, worker: Any) -> None:
        """Let the server go first, make room for the control actors beside the slots, and start beating."""
        if not self._settings.embedded:
            stand_back(self._settings.worker_nice)
        slots = worker.worker_threads
        if slots + _SPARE_CONNECTIONS > self._settings.db_pool:
            _log.warning(
                "TOWER_DB_POOL=%d is small for %d threads; raise it to %d.", self._settings.db_pool, slots, slots + _SPARE_CONNECTIONS
            )
        worker.worker_threads = CONTROL_THREADS
        sys.setswitchinterval(_SWITCH_S)
        queues = [queue for queue in self._registry.queues if not worker.consumer_whitelist or queue in worker.consumer_whitelist]
        traces = not worker.consumer_whitelist or TRACE_QUEUE in worker.consumer_whitelist
        try:
            self._prepare_database()
        except Exception as error:
            # dramatiq would log this and run tasks without a heartbeat; a process that ends is started again.
            _log.critical("the worker cannot start: %s", error)
            raise SystemExit(1) from error
        self._start(slots, queues, self.write_trace if traces else None)
        take_while(broker, queues, lambda: self._worker is not None and self._worker.free_slots > 0)

    def before_worker_shutdown(self, broker: dramatiq.Broker, worker: Any) -> None:
        """Hand back what runs before dramatiq waits for its threads; the embedded server ends at once, as Ctrl-C should."""
        self._is_leaving = take_while(broker, self._registry.queues, lambda: False)
        if self._is_leaving:
            self._dispatcher.slots = NoSlots()
        self._stop(0 if self._settings.embedded else self._settings.shutdown_grace_s)

    def _prepare_database(self) -> None:
        while True:
            try:
                db.migrate()
                return
            except Unavailable as error:
                _log.warning("%s The worker starts when it does.", error.message)

    def _start(self, slots: int, queues: list[str], write_trace: Callable[[str], None] | None) -> None:
        self._worker = WorkerProcess(self._settings, self._nudger, slots=slots, queues=queues)
        self._runner = Runner(
            self._settings, self._registry, self._nudger, self._worker, self._dispatcher.run_pass, write_trace, lambda: self._tracer.lag_s
        )
        self._dispatcher.slots = self._runner
        self._worker.start(self._runner.look, lambda: self._dispatcher.due_s, self._runner.abandon)
        decide = partial(self._decide, self._runner)
        self._errands = {ORCHESTRATE: Errand(ORCHESTRATE, decide, _DECIDE_S, loaded_s=_LOADED_S, can_wait=self._can_wait)}
        if write_trace:
            self._tracer.follow_power_cut()
            self._errands[TRACE] = Errand(TRACE, self._tracer.trace_all, _TRACE_S, loaded_s=_LOADED_S, enough=TOGETHER)
        for name, errand in self._errands.items():
            errand.start()
            self._nudger.deliver_here(name, errand)
        if not self._settings.embedded:  # the server has a sweep already
            self._sweep = Sweep(self._settings, self._nudger, write_trace)
            self._sweep.start()

    def _stop(self, grace_s: float) -> None:
        if self._sweep:
            self._sweep.stop()
        if self._worker:
            self._worker.stop(grace_s)
        for name, errand in self._errands.items():
            self._nudger.deliver_here(name, None)
            errand.stop()
        self._tracer.stop()


def _actor(broker: dramatiq.Broker, function: Callable[[str], None], name: str, queue: str, priority: int) -> None:
    def act(task_id: str) -> None:
        try:
            function(task_id)
        except Unavailable as error:
            # The row is as it was, and the sweep nudges again: nothing to do but say it.
            _log.warning("%s %s waits.", error.message, name, extra={"fields": {"task": task_id}})
        fault("message.done")

    dramatiq.actor(actor_name=name, queue_name=queue, priority=priority, broker=broker)(act)
