"""A worker without a tower, to be killed: runs commands that fork and leave, one after the other, for the task it is given."""

import os
import sys

from actors.attempt import Attempt
from actors.guard import Guard
from tower.leases import Claim
from tower.settings import Settings


def main() -> None:
    guard = Guard(embedded=True, when_lost=lambda: None)
    guard.start(None)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    while True:
        claim = Claim(sys.argv[1], os.getpid(), "t", "w", "command", "{}", 60.0, None, 1, 1, 0, 0.0)
        with Attempt(claim, Settings(), guard) as attempt:
            attempt.run(["sh", "-c", "sleep 300 & setsid sleep 300 & (setsid sleep 300 &); sleep 0.02"])


if __name__ == "__main__":
    main()
