"""What runs on this machine on behalf of a task."""

import psutil

from tests.servers import wait_for


def marked(task_id: str) -> list[int]:
    """Return the live processes that carry the mark of a task; a zombie is dead."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TOWER_TASK_ID") == task_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def scribe_of(pid: int) -> psutil.Process | None:
    """Return the scribe that a process has started; None if it has none."""
    children = psutil.Process(pid).children(recursive=True)
    return next((child for child in children if _is_alive(child, "actors.scribe")), None)


def guardian_of(pid: int, *, besides: psutil.Process | None = None) -> psutil.Process:
    """Wait for a guardian that a process has started, another one than is given, and return it."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [child for child in psutil.Process(pid).children(recursive=True) if child != besides and _is_alive(child, "guardian.py")]
        return bool(found)

    wait_for("a guardian", look)
    return found[0]


def _is_alive(process: psutil.Process, program: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and any(word.endswith(program) for word in process.cmdline())
    except psutil.Error:
        return False
