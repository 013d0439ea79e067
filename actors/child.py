"""Child processes: their output into the log, and the end of their whole tree."""

import codecs
import io
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tower.faults import fault
from tower.handler import Fail, Finished, Stopped
from tower.host import MARK, end_marked, group_lives, mark
from tower.settings import child_environment

if TYPE_CHECKING:
    from actors.attempt import Attempt

#: Why an attempt must end at once: see attempt.py, which imports this module.
LEASE_LOST = "lease_lost"

#: From the first request to end to the one that cannot be refused.
TERM_S = 4.5
#: How long output is read on after the command itself has ended, while a process it left holds the pipe.
_LINGER_S = 0.5
_TICK_S = 0.1
_PAUSE_S = 0.02
_TAIL_LINES = 20
_TAIL_CHARS = 4000
_READ = 64 * 1024
_LONGEST_LINE = 16 * 1024


#: What a child is until the guardian knows it. Standard error stands for the gate first, so that standard input stays a plain file; a
#: worker that dies before it opens the gate closes it, and nothing is run.
_GATE = 'exec 3<&2 2>&1; read -r go <&3 || exit 97; exec "$@" 3<&-'
_GATE_NAME = "tower-gate"
#: How a shell exits that cannot run a program.
_NOT_RUN = (126, 127)


def run(attempt: "Attempt", argv: Sequence[str], *, cwd: str | None, env: Mapping[str, str], stdin: str | None) -> Finished:
    """Run a command in its own process group until it ends or the attempt must; see TaskContext.run."""
    if attempt.stop_reason:
        raise Stopped(attempt.stop_reason)
    fault("spawn.before")
    process, gate = _start(attempt, argv, cwd or str(attempt.folder), env, stdin)
    with _Output(attempt, process) as output:
        try:
            _open_gate(attempt, process, gate)
            _follow(attempt, process, output)
        finally:
            _end_tree(attempt, process, output)
    fault("run.child_done")
    if attempt.stop_reason:
        raise Stopped(attempt.stop_reason)
    tail = output.tail()
    if process.returncode in _NOT_RUN and tail.startswith(f"{_GATE_NAME}:"):
        raise Fail("command_not_started", f"{argv[0]!r} could not be started: {tail.splitlines()[0].rpartition(': ')[2]}.")
    return Finished(process.returncode, tail)


def _start(
    attempt: "Attempt", argv: Sequence[str], cwd: str, env: Mapping[str, str], stdin: str | None
) -> "tuple[subprocess.Popen[bytes], int]":
    """Start the command behind its gate; return it with the end of the pipe that opens it."""
    marked = {MARK: mark(attempt.id, attempt.attempt), "TOWER_TASK_ID": attempt.id, "TOWER_ATTEMPT": str(attempt.attempt)}
    environment = {"PYTHONUNBUFFERED": "1", **child_environment(), **env, **marked}  # a log that follows, not one at the end
    command = ["/bin/sh", "-c", _GATE, _GATE_NAME, _program(argv[0], cwd, environment), *argv[1:]]
    shut, gate = os.pipe()
    try:
        with _as_file(stdin) as source:
            process = subprocess.Popen(  # noqa: S603  # running commands is what it is for
                command, cwd=cwd, env=environment, stdin=source, stdout=subprocess.PIPE, stderr=shut, start_new_session=True
            )
    except (OSError, ValueError) as error:
        os.close(gate)
        raise Fail("command_not_started", f"{argv[0]!r} could not be started: {error}") from None
    finally:
        os.close(shut)
    return process, gate


def _program(name: str, cwd: str, environment: Mapping[str, str]) -> str:
    """Return what to call a program at the gate; raise Fail if there is none, which the shell there would say in its own words."""
    if not os.path.isdir(cwd):
        raise Fail("command_not_started", f"There is no folder {cwd!r} on the worker; check cwd.")
    if "/" in name:
        found = name if os.path.exists(os.path.join(cwd, name)) else None
    else:
        folders = environment.get("PATH", os.defpath).split(os.pathsep)
        found = shutil.which(name, os.F_OK, os.pathsep.join(os.path.join(os.path.abspath(cwd), folder) for folder in folders))
    if found is None and "\0" not in name:
        words = " There is no shell in between: give the words one by one." if " " in name else ""
        raise Fail("command_not_found", f"There is no program {name!r} on the worker.{words}")
    return found if found and name.startswith("-") else name  # the shell would take it for an option


def _open_gate(attempt: "Attempt", process: "subprocess.Popen[bytes]", gate: int) -> None:
    """Let the command run once the guardian knows of it."""
    try:
        attempt.watch(process.pid)
        fault("spawn.gate")
        if not attempt.stop_reason:
            os.write(gate, b"go\n")
    except BrokenPipeError:
        pass  # somebody killed it at the gate
    finally:
        os.close(gate)
    fault("spawn.after_gate")


def _as_file(text: str | None) -> IO[bytes]:
    """Return standard input as a file: unlike a pipe it never blocks the writer."""
    if text is None:
        return Path(os.devnull).open("rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    file.write(text.encode())
    file.seek(0)
    return file


def _follow(attempt: "Attempt", process: "subprocess.Popen[bytes]", output: "_Output") -> None:
    """Read output until the command ends or the attempt must stop."""
    ended: float | None = None
    first = True
    while not attempt.stop_reason:
        output.wait(_TICK_S)
        if first:
            first = False
            fault("run.mid")
        if process.poll() is not None:
            ended = ended or time.monotonic()
            if output.is_over or time.monotonic() - ended > _LINGER_S:
                return


def _end_tree(attempt: "Attempt", process: "subprocess.Popen[bytes]", output: "_Output") -> None:
    """End every process of the command: ask its group, read on while it obeys, force it, and find what left the group."""
    if attempt.stop_reason != LEASE_LOST:  # then there is no time to ask
        _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + TERM_S
        while time.monotonic() < deadline and (process.poll() is None or group_lives(process.pid)):
            output.wait(_TICK_S)
    _signal(process, signal.SIGKILL)
    process.wait()
    end_marked(attempt.id, attempt.attempt)
    attempt.release(process.pid)


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left in the group


class _Output:
    """Turns a command's output into log lines, within a bound however long a line is, and keeps the last ones."""

    def __init__(self, attempt: "Attempt", process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None  # noqa: S101  # we asked for a pipe
        self._attempt = attempt
        self._pipe = process.stdout
        self._decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
        self._rest = ""
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        #: Whether everybody has closed the other end.
        self.is_over = False
        os.set_blocking(self._pipe.fileno(), False)

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *exception: object) -> None:
        for _ in range(32):  # a pipe holds no more than this
            if self.is_over or not self._read():
                break
        self._pipe.close()
        if self._rest:
            self._say([self._rest])

    def wait(self, seconds: float) -> None:
        """Take what is there, or wait a moment for something to come."""
        if self.is_over:
            time.sleep(_PAUSE_S)
        elif select.select([self._pipe], [], [], seconds)[0]:
            self._read()

    def _read(self) -> bool:
        """Take what is there; False if there is nothing."""
        try:
            data = os.read(self._pipe.fileno(), _READ)
        except BlockingIOError:
            return False
        self.is_over = not data
        if data:
            self._attempt.heard()
        self._take(self._decoder.decode(data, final=not data))
        return bool(data)

    def tail(self) -> str:
        """Return the last lines, within a few thousand characters."""
        return "\n".join(self._tail)[-_TAIL_CHARS:]

    def _take(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        longest = _LONGEST_LINE + self._attempt.mask.longest  # what may be the beginning of a secret waits for its end
        while len(self._rest) > longest:
            self._rest = self._attempt.mask.text(self._rest)
            lines.append(self._rest[:_LONGEST_LINE])
            self._rest = self._rest[_LONGEST_LINE:]
        if lines:
            self._say(lines)

    def _say(self, lines: list[str]) -> None:
        said = self._attempt.mask.text("\n".join(lines))
        self._attempt.log(said)
        self._tail.extend(said.split("\n"))
