"""Door 1, the server: the API, and in the embedded mode the worker as well."""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import dramatiq
import uvicorn
from fastapi import FastAPI

from actors.crew import Crew
from actors.handlers import load as load_handlers
from tower import faults, log
from tower.api import create_app
from tower.api.wire import Wire
from tower.broker import Nudger, open_broker
from tower.db import close_database, open_database
from tower.errors import SettingsError
from tower.orchestrator import EnhancedOrchestrator
from tower.settings import Settings, load

#: How often an idle thread of the embedded worker looks whether it should end; messages wake it at once.
_IDLE_MS = 200
#: Answers under way get this long after a request to end.
_GRACE_S = 2

_log = logging.getLogger("tower")


def build(settings: Settings) -> FastAPI:
    """Put the server together; everything it opens is opened when the app starts."""
    faults.arm(settings.fault)
    open_database(settings)
    registry, broker = load_handlers(), open_broker(settings)
    crew = Crew(settings, registry, broker)
    orchestrator = EnhancedOrchestrator(settings, registry, Nudger(broker), crew.write_trace if settings.embedded else None)
    worker = _EmbeddedWorker(settings, broker, crew) if settings.embedded else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await orchestrator.start()
        if worker:
            worker.start()
        _log.info(
            "tower is up" if orchestrator.prepared else "tower is up, but its database is not",
            extra={"fields": {"mode": "embedded" if worker else "services", "traces": settings.trace_dir.absolute()}},
        )
        yield
        if worker:
            await asyncio.to_thread(worker.stop)
        await orchestrator.stop()
        close_database()
        _log.info("tower is down")

    app = create_app(settings, orchestrator, registry, broker, lifespan)
    app.state.take_no_more = crew.take_no_more
    return app


class _Server(uvicorn.Server):
    """Takes no more tasks from the moment it is asked to stop: streams are waited for before the worker is stopped."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Answer a signal."""
        # In a thread: the one that was interrupted may hold what this needs.
        threading.Thread(target=self.config.app.state.take_no_more, daemon=True).start()  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


class _EmbeddedWorker:
    """dramatiq's worker inside the server; it waits for the database in a thread, so that the server never does."""

    def __init__(self, settings: Settings, broker: dramatiq.Broker, crew: Crew) -> None:
        broker.add_middleware(crew)
        self._worker = dramatiq.Worker(broker, worker_threads=settings.slots, worker_timeout=_IDLE_MS)
        self._starting = threading.Thread(target=self._worker.start, name="start-worker", daemon=True)

    def start(self) -> None:
        self._starting.start()

    def stop(self) -> None:
        self._starting.join(timeout=1)
        if not self._starting.is_alive():
            self._worker.stop(timeout=10_000)


def main(*, host: str | None = None, port: int | None = None) -> int:
    """Run the server until it is asked to stop; return the exit code. An address given here goes before HOST and PORT."""
    try:
        settings = load(host=host, port=port)
        log.configure(settings)
        listener = _listen(settings)
        app = build(settings)
    except SettingsError as error:
        print(f"tower: {error}", file=sys.stderr)
        return 2
    for warning in settings.warnings():
        _log.warning(warning)
    # uvicorn hands a signal on after its shutdown; by then there is nothing left to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    options = {"http": Wire, "log_config": None, "access_log": False, "server_header": False, "timeout_graceful_shutdown": _GRACE_S}
    server = _Server(uvicorn.Config(app, **options))  # type: ignore[arg-type]
    address, number = listener.getsockname()[:2]
    _log.info("listening on http://%s:%d", f"[{address}]" if ":" in address else address, number)
    gc.collect()
    gc.freeze()  # what the programs consist of is never garbage: to look through it now and then made every request wait for 0.1 s
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _listen(settings: Settings) -> socket.socket:
    """Take the port before anything else is touched; raise SettingsError if somebody else has it."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        cure = "Take another PORT." if error.errno in (errno.EADDRINUSE, errno.EACCES) else "Give an address of this machine as HOST."
        raise SettingsError(f"HOST={settings.host} PORT={settings.port} cannot be listened on: {why}. {cure}") from None


if __name__ == "__main__":
    sys.exit(main())
