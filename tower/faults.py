"""Named places where a test may let something break: `fault("claim.after_commit")` does nothing unless TOWER_FAULT says so.

TOWER_FAULT is `name:n:action`, several separated by commas: at the n-th passing of that point in this process the action happens, once;
with `n+` at every passing from then on. The name `*` counts every point. Actions: `kill` (SIGKILL to this process), `stop` (SIGSTOP),
`raise` (OSError), `sleep=SECONDS`.
"""

import os
import re
import signal
import threading
import time
from dataclasses import dataclass, field

#: Every point there is, in the order in which a task passes them.
POINTS = (
    "front.before_insert",
    "front.after_commit",
    "front.after_send",
    "orchestrate.received",
    "dispatch.before_commit",
    "dispatch.after_commit",
    "dispatch.after_send",
    "claim.before",
    "claim.after_commit",
    "spawn.before",
    "spawn.gate",
    "spawn.after_gate",
    "run.mid",
    "run.child_done",
    "log.after_commit",
    "artifact.after_commit",
    "finish.before",
    "finish.after_commit",
    "message.done",
    "beat.before",
    "trace.before_write",
    "trace.after_temporary",
    "trace.after_rename",
    "trace.before_mark",
    "sweep.after_select",
    "sweep.after_fence",
    "sweep.after_commit",
    "migrate.mid",
    "retention.mid",
)

_RULE = re.compile(r"(?P<name>[a-z_.]+|\*):(?P<nth>[1-9][0-9]{0,8})(?P<on>\+?):(?P<action>kill|stop|raise|sleep=[0-9]+(\.[0-9]+)?)")


@dataclass
class _Rule:
    name: str
    nth: int
    goes_on: bool
    action: str
    passed: int = field(default=0)

    def is_due(self, name: str) -> bool:
        """Count a passing; return whether the action happens at this one."""
        if self.name not in (name, "*"):
            return False
        self.passed += 1
        return self.passed == self.nth or (self.goes_on and self.passed > self.nth)


_rules: list[_Rule] = []
_lock = threading.Lock()


def parse(text: str) -> list[_Rule]:
    """Return the rules of a TOWER_FAULT; raise ValueError for one that names no point or no action."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _RULE.fullmatch(part)
        if not match or match["name"] not in (*POINTS, "*"):
            raise ValueError(f"expected point:n:kill|stop|raise|sleep=SECONDS with a point of tower/faults.py, got {part!r}")
        found.append(_Rule(match["name"], int(match["nth"]), bool(match["on"]), match["action"]))
    return found


def arm(text: str | None) -> None:
    """Let the faults of a TOWER_FAULT happen in this process from now on; none of them if it is empty."""
    with _lock:
        _rules[:] = parse(text or "")


def fault(name: str) -> None:
    """Pass a point: break here if a test asked for it."""
    if _rules:
        _pass(name)


def _pass(name: str) -> None:
    with _lock:
        due = [rule.action for rule in _rules if rule.is_due(name)]
    for action in due:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "raise":
            raise OSError(5, "a fault that was asked for", name)
        else:
            time.sleep(float(action.partition("=")[2]))
