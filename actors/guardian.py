"""The guardian: ends a worker's child processes when the worker dies, even by kill -9, or lets their leases run out.

A program of its own without packages: `python guardian.py CLOCK`. On standard input its worker says, one a line,
`+ group started mark deadline`, `= group deadline` and `- group`; the end of the input is the end of the worker.
"""

import os
import select
import signal
import sys
import time

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from tower import proc  # it is started without the path to our own packages

#: The name of the mark in a child's environment, as in tower/host.py.
_MARK = "TOWER_TASK"
#: From TERM to KILL when the worker is gone: short, since somebody waits to run its tasks again.
_TERM_S = 0.2
#: The longest sleep: a machine that was asleep finds deadlines passed that no timer counted.
_NAP_S = 0.25
_PAUSE_S = 0.01


class Group:
    """A process group with those who left it, told by their mark."""

    def __init__(self, number: int, started: int, mark: str, deadline: float) -> None:
        self._number, self._started = number, started
        self.mark, self.deadline = mark, deadline
        #: How often in a row nobody with the mark was found. Once may be chance: in the midst of its exec a process has no environment.
        self._absent = 0

    @property
    def is_gone(self) -> bool:
        """Whether all of it was ended."""
        return self._absent > 1

    def send(self, number: int) -> bool:
        """Signal the group, unless its number is somebody else's by now; return whether there was anybody."""
        if proc.started(self._number) not in (None, self._started):
            return False
        try:
            os.killpg(self._number, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def note(self, *, was_found: bool) -> None:
        """Note whether a look found anybody with the mark."""
        self._absent = 0 if was_found else self._absent + 1


def end(groups: list[Group]) -> None:
    """Kill the groups and all who carry their marks; again, until each is gone."""
    for group in groups:
        group.send(signal.SIGKILL)
    found = proc.carrying(_MARK, {group.mark for group in groups})
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass  # it ended by itself
    for group in groups:
        group.note(was_found=bool(found))


def hear(groups: dict[int, Group], line: str) -> None:
    """Take a word of the worker's."""
    verb, number, *rest = line.split()
    if verb == "+":
        groups[int(number)] = Group(int(number), int(rest[0]), rest[1], float(rest[2]))
    elif verb == "=" and int(number) in groups:
        groups[int(number)].deadline = float(rest[0])
    elif verb == "-":
        groups.pop(int(number), None)


def guard(clock: int) -> list[Group]:
    """Watch deadlines until the worker is gone; return the groups that it left."""
    groups: dict[int, Group] = {}
    rest = b""
    while True:
        left = min((group.deadline for group in groups.values()), default=0.0) - time.clock_gettime(clock)
        if select.select([0], [], [], max(_PAUSE_S, min(left, _NAP_S)) if groups else None)[0]:
            data = os.read(0, 65536)
            if not data:
                return list(groups.values())
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                hear(groups, line.decode())
        now = time.clock_gettime(clock)
        late = {number: group for number, group in groups.items() if now >= group.deadline}
        if late:
            end(list(late.values()))
        for number, group in late.items():
            if group.is_gone:
                del groups[number]


def end_all(groups: list[Group]) -> None:
    """End what a dead worker left: ask it, then kill until nothing is found."""
    deadline = time.monotonic() + _TERM_S
    for group in groups:
        group.send(signal.SIGTERM)
    while time.monotonic() < deadline and any(group.send(0) for group in groups):
        time.sleep(_PAUSE_S)
    while not all(group.is_gone for group in groups):
        end(groups)
        time.sleep(_PAUSE_S)


def main() -> None:
    """Guard until the worker is gone, whatever signals come that are meant for it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_all(guard(int(sys.argv[1])))


if __name__ == "__main__":
    main()
