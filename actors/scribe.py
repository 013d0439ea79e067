"""The scribe: a process beside a busy worker that makes the folders of its tasks, on another core and without its interpreter's lock.

It is started when many tasks end at once and ends when it has had nothing to do for a while. It changes no row; whoever asked it marks what
it made, and makes what it did not, so nothing depends on it.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from actors import whole
from actors.whole import Mark
from tower import db
from tower.errors import TowerError
from tower.settings import Settings, child_environment

#: Folders asked for at once that are worth another process, and the seconds without any after which it ends.
_MANY, _IDLE_S = 8, 60.0
#: How long it may take for an answer, and for each folder beside that, and how long it is left alone after it failed.
_PATIENCE_S, _FOLDER_S, _PAUSE_S = 3.0, 0.05, 30.0
#: How long it may take to start, and to end.
_START_S, _STOP_S = 30.0, 1.0

_log = logging.getLogger(__name__)


class Scribe:
    """This process's side of its scribe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._has_said_hello = False
        self._launched_at = self._rests_until = 0.0
        self._is_stopping = False
        #: Held by whoever asks, and while it is started or stopped.
        self._turn = threading.Lock()

    def make(self, ids: Sequence[str]) -> dict[str, Mark]:
        """Have folders made; return those that were, by task: none if these are few, or it is busy, still starting, or in trouble."""
        if len(ids) < _MANY or not self._turn.acquire(blocking=False):
            return {}
        try:
            if self._process is None:
                self._launch()
            return self._answer(self._process, ids) if self._process else {}
        finally:
            self._turn.release()

    def stop(self) -> None:
        """Let it end, once it has done what it has in hand; kill it if that takes long."""
        self._is_stopping = True
        process = self._process
        if not self._turn.acquire(timeout=_STOP_S):
            if process:
                process.kill()
            self._turn.acquire()
        try:
            process = self._process
            if process:
                self._forget(process)
        finally:
            self._turn.release()
        if process:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def _launch(self) -> None:
        if self._is_stopping or time.monotonic() < self._rests_until:
            return
        try:
            process = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, "-P", "-m", __name__],
                # It finds the packages that we found, and no others.
                env={**child_environment(), "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for us; it ends with its input
            )
        except OSError as error:
            self._rest(error)
            return
        self._process, self._has_said_hello, self._launched_at = process, False, time.monotonic()
        threading.Thread(target=self._see_off, args=(process,), name="scribe", daemon=True).start()
        told = {"database_url": self._settings.database_url, "trace_dir": str(self._settings.trace_dir)}
        with suppress(OSError):  # it has ended already, which is seen when it is asked
            _write(process, {"idle_s": _IDLE_S, "settings": told})

    def _see_off(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for its end, so that it leaves nothing behind, and another one can be started."""
        code = process.wait()
        with self._turn:
            if self._process is not process:
                return
            self._forget(process)
        if code:
            self._rest(f"it ended with {code}")

    def _answer(self, process: subprocess.Popen[bytes], ids: Sequence[str]) -> dict[str, Mark]:
        try:
            if not self._has_said_hello:
                if not _is_readable(process.stdout, 0):
                    if time.monotonic() - self._launched_at > _START_S:
                        raise TimeoutError(f"it did not start within {_START_S:g} s")
                    return {}  # it takes half a second
                _read(process, _PATIENCE_S)
                self._has_said_hello = True
            _write(process, ids)
            return {task_id: Mark(**told) for task_id, told in _read(process, _PATIENCE_S + _FOLDER_S * len(ids)).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self._forget(process)
            process.kill()
            if process.poll() != 0:  # else its time had passed just now
                self._rest(error)
            return {}

    def _rest(self, why: object) -> None:
        if self._is_stopping:
            return
        _log.warning("folders are made without the scribe for %g s: %s", _PAUSE_S, why)
        self._rests_until = time.monotonic() + _PAUSE_S

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        self._process = None
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()


def _write(process: subprocess.Popen[bytes], told: object) -> None:
    assert process.stdin is not None  # noqa: S101  # we asked for a pipe
    process.stdin.write(json.dumps(told).encode() + b"\n")


def _read(process: subprocess.Popen[bytes], seconds: float) -> Any:
    """Return what it says next; raise OSError if it has not said it all in so many seconds, or has ended."""
    assert process.stdout is not None  # noqa: S101  # we asked for a pipe
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        if not _is_readable(process.stdout, max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"nothing for {seconds:g} s")
        data = process.stdout.read(65536)
        if not data:
            raise BrokenPipeError("it has ended")
        line += data
    return json.loads(line)


def _is_readable(pipe: IO[bytes] | int | None, seconds: float) -> bool:
    assert pipe is not None  # noqa: S101  # we asked for it
    look = select.poll()  # select takes no number above a thousand, and a server has so many connections
    look.register(pipe, select.POLLIN)
    return bool(look.poll(seconds * 1000))


def main() -> None:
    """Be the scribe: read settings, then task ids, a line each; answer each line with what was made."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.disable()  # whoever asks meets the same trouble, and says it
    told = json.loads(sys.stdin.buffer.readline() or "{}")
    if not told:
        return
    settings = Settings(**told["settings"])
    db.open_database(settings)
    with suppress(BrokenPipeError):  # nobody listens any more
        _say({})
        while _is_readable(0, told["idle_s"]) and (line := sys.stdin.buffer.readline()):
            _say(_made(settings.trace_dir, json.loads(line)))


def _made(root: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    try:
        return {task_id: vars(mark) for task_id, mark in db.read(partial(whole.make, root, ids), sees_arrived=False).items()}
    except TowerError:
        return {}


def _say(told: object) -> None:
    line = json.dumps(told).encode() + b"\n"
    while line:
        line = line[os.write(1, line) :]


if __name__ == "__main__":
    main()
