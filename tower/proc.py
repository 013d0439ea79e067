"""What Linux tells of processes under /proc; without anything but the standard library, since the guardian has nothing else."""

import os
from collections.abc import Iterator

#: Whether there is anything to read; on macOS there is not.
EXISTS = os.path.exists("/proc/self/stat")


def pids() -> Iterator[int]:
    """Return the processes there are."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit()) if EXISTS else iter(())


def stat(pid: int) -> tuple[str, int, int] | None:
    """Return a process's state, its group, and when it started in ticks since boot; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # See proc(5): the second field may hold spaces and ends with the last parenthesis.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields[0].decode(), int(fields[2]), int(fields[19])


def started(pid: int) -> int | None:
    """Return when a process started, in ticks since boot."""
    found = stat(pid)
    return found[2] if found else None


def carrying(name: str, values: set[str]) -> list[int]:
    """Return the live processes that carry one of these values under a name in their environment; a zombie has none."""
    found = []
    for pid in pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = b"\0" + file.read()
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
        value = environment.partition(f"\0{name}=".encode())[2].partition(b"\0")[0]
        if value and value.decode("utf-8", "replace") in values:
            found.append(pid)
    return found
