"""The command that tasks run under fire: it writes down that it ran, and whether an earlier run of its task still does.

    python -S -E journal.py FOLDER SECONDS [fork|setsid|stubborn] [exit=CODE]

One file per task, a JSON line per thing that happened. A new run first writes its own start, then looks whether a process of another
run lives: of two that overlap, the later one sees it. Needs nothing but Python, so that it starts quickly.
"""

import json
import os
import signal
import sys
import time

_KILL = 1 << (signal.SIGKILL - 1)


def started(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; None if there is none, or only what is left of one."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/status") as file:
            pending = sum(int(line.split()[1], 16) for line in file if line.startswith(("SigPnd", "ShdPnd")))
    except OSError:
        return None
    # A zombie has ended; one whose SIGKILL is on its way will do nothing more.
    return None if fields[0] in "ZX" or pending & _KILL else fields[19]


def write(path: str, attempt: int, what: str, **more: object) -> None:
    """Append one line, whole."""
    line = {"attempt": attempt, "what": what, "at": time.clock_gettime(time.CLOCK_BOOTTIME), "pid": os.getpid(), **more}
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(fd, (json.dumps(line) + "\n").encode())
    os.close(fd)


def living(path: str, attempt: int) -> list[int]:
    """Return the pids of other runs of the task that still run."""
    with open(path) as file:
        lines = [json.loads(line) for line in file]
    return [line["pid"] for line in lines if line["attempt"] != attempt and "born" in line and started(line["pid"]) == line["born"]]


def main() -> int:
    """Start, do nothing for a while, end."""
    folder, seconds, *modes = sys.argv[1:]
    task, attempt = os.environ["TOWER_TASK_ID"], int(os.environ["TOWER_ATTEMPT"])
    path = os.path.join(folder, task)
    if "stubborn" in modes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    write(path, attempt, "start", born=started(os.getpid()), parent=os.getppid())
    for pid in living(path, attempt):
        write(path, attempt, "overlap", other=pid)
    if ("fork" in modes or "setsid" in modes) and os.fork() == 0:
        if "setsid" in modes:
            os.setsid()
        write(path, attempt, "child", born=started(os.getpid()))
        time.sleep(float(seconds) + 30)
        return 0
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    time.sleep(float(seconds))
    write(path, attempt, "end")
    sys.stdout.write("done\n")
    return next((int(mode.partition("=")[2]) for mode in modes if mode.startswith("exit=")), 0)


if __name__ == "__main__":
    sys.exit(main())
