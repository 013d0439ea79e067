"""One attempt as its handler sees it: the TaskContext, its log, its folder, and when it must stop."""

import itertools
import math
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from actors import child
from actors.guard import Guard
from tower import db, leases, queries
from tower.errors import Unavailable
from tower.faults import fault
from tower.handler import Fail, Finished, Previous, Stopped
from tower.host import lease_time, make_attempt_folder, mark
from tower.leases import CHUNK, Claim
from tower.lifecycle import LogPart
from tower.masking import SHORTEST, Mask
from tower.settings import Settings, secret
from tower.trace import log_line

#: Why an attempt must stop.
CANCEL, TIMEOUT, SILENCE, SHUTDOWN, LEASE_LOST = "cancel", "timeout", "silence", "shutdown", child.LEASE_LOST
#: There is no guardian for its processes.
UNGUARDED = "unguarded"

#: A worker believes in a lease for this part of it; the rest is for ending what runs.
TRUST = 0.8
#: At this part the guardian ends the processes of a worker that did not.
GUARDED = 0.9

_LOOK_S = 0.5
_FLUSH_S = 2.0
_LINE = 16 * 1024
_FLUSH = 64 * 1024
_DEEPEST = 10
#: A handler that has not ended so long after it was to is given up; a child process takes half of it at most.
_OBEY_S = 12.0
#: A child process that its worker has not ended so long after the attempt's time is ended by the guardian.
_BELT_S = child.TERM_S + 1
#: What the next attempt is shown of a log.
_PREVIOUS_CHARS = 16_000
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1a\x1c-\x1f\x7f-\x9f\ud800-\udfff]")


class Attempt:
    """The TaskContext of one claim; the worker stops it, beats for it and flushes its log."""

    def __init__(self, claim: Claim, settings: Settings, guard: Guard | None = None) -> None:
        self.claim = claim
        self.id, self.attempt = claim.id, claim.attempt
        self._settings = settings
        self._guard = guard
        self._began = time.monotonic()
        self._deadline = self._began + claim.timeout_s
        self._trusted_until = self._guarded_until = math.inf
        self._parts = itertools.count()
        self._in_hand: LogPart | None = None
        #: Hides the secrets that the handler has asked for.
        self.mask = Mask()
        self._stop: str | None = None
        self._woken = threading.Event()
        #: When it last said something.
        self._said_at = self._began
        #: When it was first asked to stop.
        self._stopped_at: float | None = None
        #: Whether its handler has returned; its end may not be recorded yet.
        self._has_ended = False
        self._lines: list[str] = []
        self._waiting = 0
        #: Characters said so far, and kept at most.
        self._logged, self._limit = 0, settings.log_limit_mb * 1_000_000
        self._buffer_lock = threading.Lock()
        self._flush_lock = threading.Lock()

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended = True
        if "folder" in self.__dict__:
            shutil.rmtree(self.folder, ignore_errors=True)

    def stop(self, reason: str) -> None:
        """Ask the handler to end; the first reason counts, but a lost lease beats all."""
        if self._stop is None or reason == LEASE_LOST:
            self._stop = reason
        self._stopped_at = self._stopped_at or time.monotonic()
        self._woken.set()

    def trust(self, leased_at: float) -> None:
        """Believe in the lease for a part of its length, counted from the time, on the leases' clock, before it was asked for."""
        if self.stop_reason == LEASE_LOST:
            return  # its processes may have been ended already
        self._trusted_until = leased_at + self._settings.lease_s * TRUST
        timed_out = self._lease_time() + self._deadline - time.monotonic()
        self._guarded_until = min(leased_at + self._settings.lease_s * GUARDED, timed_out + _BELT_S)
        if self._guard:
            self._guard.renew(mark(self.id, self.attempt), self._guarded_until)

    def _lease_time(self) -> float:
        return lease_time(embedded=self._settings.embedded)

    def watch(self, group: int) -> None:
        """Let the guardian end a process group if we cannot; without a guardian the attempt must stop."""
        if self._guard and not self._guard.watch(group, mark(self.id, self.attempt), self._guarded_until):
            self.stop(UNGUARDED)

    def release(self, group: int) -> None:
        """Tell the guardian that a process group has ended."""
        if self._guard:
            self._guard.release(group)

    @property
    def stop_reason(self) -> str | None:
        """Why it must stop, or None if it may go on."""
        if self._stop != LEASE_LOST and self._lease_time() > self._trusted_until:
            self.stop(LEASE_LOST)  # somebody else may take it soon, whether or not the database can tell us
        if self._stop is None and self.remaining_s <= 0:
            self.stop(TIMEOUT)
        silence_s = self.claim.silence_s
        if self._stop is None and silence_s is not None and time.monotonic() - self._said_at > silence_s:
            self.stop(SILENCE)  # for good: what it says when it is ended changes nothing
        return self._stop

    @property
    def cancelled(self) -> bool:
        """Whether the attempt should stop as soon as it can."""
        return self.stop_reason is not None

    @property
    def ignores_its_end(self) -> bool:
        """Whether the handler still runs long after it was to end: no child process does, but a Python function can."""
        must = not self._has_ended and self.stop_reason not in (None, SHUTDOWN, LEASE_LOST, UNGUARDED)
        return must and self._stopped_at is not None and time.monotonic() - self._stopped_at > _OBEY_S

    @property
    def remaining_s(self) -> float:
        """Seconds until the attempt times out."""
        return max(0.0, self._deadline - time.monotonic())

    @cached_property
    def previous(self) -> Previous | None:
        """What the attempt before left; None on the first."""
        if self.claim.previous is None:
            return None
        tail = db.read(partial(queries.log_tail, self.id, self.attempt - 1, _PREVIOUS_CHARS))
        return Previous(self.claim.previous, tail)

    def wait(self, seconds: float) -> None:
        """Sleep; raise Stopped when the attempt must end first."""
        end = time.monotonic() + seconds
        while not self.stop_reason and (left := end - time.monotonic()) > 0:
            self._woken.wait(min(left, self.remaining_s, _LOOK_S))
        if self.stop_reason:
            raise Stopped(self.stop_reason)

    def secret(self, name: str) -> str:
        """Return a secret of the worker, and hide it from now on."""
        try:
            value = secret(name, self._settings.secrets_dir)
        except (OSError, UnicodeDecodeError) as error:
            raise Fail("secret_unusable", f"The secret {name!r} cannot be read: {type(error).__name__}.", may_retry=False) from None
        if value is None:
            raise Fail("secret_unusable", f"There is no secret {name!r} on the worker.", may_retry=False)
        if len(value) < SHORTEST:
            raise Fail(
                "secret_unusable", f"The secret {name!r} is shorter than {SHORTEST} characters: it could not be hidden.", may_retry=False
            )
        self.mask.add(value)
        return value

    def artifact(self, name: str) -> Path:
        """Return where to write a file that shall be kept in the trace as artifacts/<name>."""
        path = self.artifacts / _checked(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @cached_property
    def folder(self) -> Path:
        """The attempt's own folder, made when first asked for: most tasks need none, and making and removing one costs milliseconds."""
        return make_attempt_folder(self.id, self.attempt)

    @property
    def artifacts(self) -> Path:
        """The folder of the files to keep."""
        return self.folder / "artifacts"

    def kept_files(self) -> dict[str, Path]:
        """Return the files that shall be kept, by name; raise Fail for a name that the trace cannot take."""
        if "folder" not in self.__dict__:
            return {}
        found = sorted(path for path in self.artifacts.rglob("*") if path.is_file() and not path.is_symlink())
        return {_checked(path.relative_to(self.artifacts).as_posix()): path for path in found}

    def run(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None, stdin: str | None = None
    ) -> Finished:
        """Run a child process whose output streams into log.txt; its whole tree ends with the attempt."""
        return child.run(self, argv, cwd=cwd, env=env or {}, stdin=stdin)

    def heard(self) -> None:
        """Note that there was output, which may be less than a line."""
        self._said_at = time.monotonic()

    def log(self, text: str) -> None:
        """Add lines to log.txt."""
        at = self._now()
        self.heard()
        if self._logged > self._limit:
            return  # cut already: to make lines of what nobody keeps would cost a slot's time
        said = self.mask.text(text)
        lines = [log_line(at, self.attempt, piece) for line in said.splitlines() or [""] for piece in _pieces(_printable(line))]
        with self._buffer_lock:
            for line in lines:
                self._add(line)
        if self._waiting >= _FLUSH:
            self.flush()

    def _now(self) -> float:
        """The database's time, reckoned from the claim."""
        return self.claim.started_at + time.monotonic() - self._began

    def _add(self, line: str) -> None:
        if self._logged > self._limit:
            return
        self._logged += len(line)
        if self._logged > self._limit:
            line = log_line(self._now(), self.attempt, f"── the log is cut here: TOWER_LOG_LIMIT_MB={self._settings.log_limit_mb}")
        self._lines.append(line)
        self._waiting += len(line)

    def flush(self) -> bool:
        """Write the waiting lines to the database; return whether there were any. A lost lease stops the attempt."""
        flushed = False
        with self._flush_lock:
            while piece := self._in_hand or self._next_part():
                self._in_hand = piece._replace(is_doubtful=True)
                append = partial(leases.append_log, self.claim, piece.part, piece.text)
                recognise = partial(leases.appended, self.claim, piece.part)
                try:
                    kept = (piece.is_doubtful and db.read(recognise)) or db.unit(append, patience_s=_FLUSH_S, recognise=recognise)
                except Unavailable:
                    break
                fault("log.after_commit")
                self._in_hand, flushed = None, True
                if not kept:
                    self.stop(LEASE_LOST)
                    break
        return flushed

    def take_tail(self) -> list[LogPart]:
        """Return the last lines, to be written together with the end; flush those before, if they are many."""
        while self._waiting > CHUNK and self.flush():
            pass
        with self._flush_lock:  # what a flush has in its hands is written before, or is here still
            found = [self._in_hand]
            while piece := self._next_part():
                found.append(piece)
            return [piece for piece in found if piece]

    def _next_part(self) -> LogPart | None:
        text = self._take()
        return LogPart(next(self._parts), text) if text else None

    def _take(self) -> str:
        with self._buffer_lock:
            taken, size = 0, 0
            while taken < len(self._lines) and size < CHUNK:
                size += len(self._lines[taken])
                taken += 1
            text = "".join(self._lines[:taken])
            del self._lines[:taken]
            self._waiting -= len(text)
            return text


def _checked(name: str) -> str:
    """Return the name of an artifact; raise Fail for one that the trace cannot take."""
    parts = name.split("/")
    if len(parts) > _DEEPEST or not all(_is_plain(part) for part in parts):
        raise Fail("artifact_name", f"An artifact is named by a relative path of plain names, as in a/b.html; got {name[:80]!r}.")
    return name


def _is_plain(part: str) -> bool:
    """Whether a name is visible, not hidden, and one that any disk takes."""
    return part.isprintable() and not part.startswith(".") and 0 < len(part.encode("utf-8", "replace")) <= 200


def _pieces(line: str) -> list[str]:
    return [line[start : start + _LINE] for start in range(0, len(line), _LINE)] or [""]


def _printable(line: str) -> str:
    """Return the line with colours kept and everything else that could act on a terminal or a database made visible."""
    if line.isprintable():
        return line
    line = _ESCAPES.sub(lambda found: found[0] if _COLOUR.fullmatch(found[0]) else "", line)
    return _CONTROL.sub("\ufffd", line)
