"""What runs on this machine on behalf of a task."""

import psutil


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


def guardian_of(pid: int) -> psutil.Process | None:
    """Return the live guardian that a process has started."""
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and any(word.endswith("guardian.py") for word in child.cmdline()):
                return child
        except psutil.Error:
            continue
    return None
