"""How a process stands back for others."""

import os
import platform
import subprocess
import sys

import pytest

_ASK = """
import ctypes, os, platform, struct, sys, threading
from tower.host import stand_back
got = []
def note():
    held = ctypes.create_string_buffer(56)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]  # sched_getattr
    assert ctypes.CDLL(None).syscall(number, 0, held, 56, 0) == 0
    _, policy, _, nice, _, turn, *_ = struct.unpack("=IIQiIQQQ", held.raw[:48])
    got.append((policy, nice, turn))
def note_elsewhere():
    other = threading.Thread(target=note)
    other.start()
    other.join()
note()
%s
note_elsewhere()
print(got)
"""


def _asked(what: str) -> list[tuple[int, int, int]]:
    """Return policy, niceness and length of a turn before this and after it, as a thread has them that was started then."""
    asked = subprocess.run([sys.executable, "-c", _ASK % what], check=True, capture_output=True, text=True)
    return list(eval(asked.stdout))  # numbers of our own


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such call elsewhere")
def test_who_stands_back_takes_long_turns() -> None:
    """Where the system knows that."""
    (policy, nice, turn), after = _asked("stand_back(5)")
    knows_turns = tuple(map(int, platform.release().split(".")[:2])) >= (6, 12)
    assert after == (policy, min(nice + 5, 19), 100_000_000 if knows_turns else turn)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such call elsewhere")
def test_who_does_not_stand_back_is_as_before() -> None:
    """With TOWER_WORKER_NICE=0."""
    before, after = _asked("stand_back(0)")
    assert before == after


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such call elsewhere")
def test_who_has_a_policy_of_its_own_keeps_it() -> None:
    """Somebody has chosen that."""
    before, after = _asked("os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)); stand_back(5)")
    assert (after[0], after[1]) == (os.SCHED_BATCH, min(before[1] + 5, 19))
