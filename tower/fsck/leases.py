"""Whether somebody works on what the rows say is worked on."""

import time
from collections.abc import Iterator

from tower import db
from tower.fsck.findings import Finding, Result
from tower.host import ProcessId
from tower.models import Task, Worker
from tower.settings import Settings
from tower.terms import DISPATCHED, RUNNING

#: More tasks than that are never in flight; what is beyond is found by the next run.
_MOST = 10_000
#: Beats that a live worker surely makes while we wait.
_BEATS = 3
#: A nudge that is due for so many seconds is sent by nobody.
_UNSENT_S = 120.0


class Leases:
    """Looks at the beats when it is made, and again when it is asked: made early, it need not wait for beats."""

    def __init__(self, settings: Settings) -> None:
        self._wait_s = settings.beat_s * _BEATS
        self._since = time.monotonic()
        self._seen = db.read(_running_without_worker)

    def check(self) -> Iterator[Result]:
        """Yield the tasks that nobody works on; no repair is ours, the sweep does it."""
        if self._seen:
            time.sleep(max(0.0, self._since + self._wait_s - time.monotonic()))
            still = db.read(_running_without_worker)
            for task_id in (one for one, beat in self._seen.items() if still.get(one) == beat):
                yield Result(Finding("no_worker", task_id, f"attempt {self._seen[task_id][0]}"), is_repaired=False)
        for task_id in db.read(_not_nudged):
            yield Result(Finding("not_nudged", task_id), is_repaired=False)


def _running_without_worker() -> dict[str, tuple[int, int]]:
    """Return attempt and beat of the tasks whose worker has no row, or is dead on this machine."""
    workers = {row["id"]: ProcessId(row["pid_space"], row["pid"], row["pid_started"]) for row in Worker.select().dicts()}
    dead = {worker_id for worker_id, process in workers.items() if process.is_dead()}
    held = Task.select(Task.id, Task.worker_id, Task.attempt, Task.beat).where(Task.status == RUNNING).limit(_MOST)
    return {
        task_id: (attempt, beat) for task_id, worker_id, attempt, beat in held.tuples() if worker_id not in workers or worker_id in dead
    }


def _not_nudged() -> list[str]:
    late = Task.select(Task.id).where(Task.status == DISPATCHED, Task.nudge_at < db.clock() - _UNSENT_S).order_by(Task.id).limit(_MOST)
    return [row[0] for row in late.tuples()]
