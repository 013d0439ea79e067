"""The tower embedded: everything in the client's process, rows in SQLite."""

import os
import sys

from common import OUT, SQLITE  # type: ignore[import-not-found]
from contenders.dates import written_at  # type: ignore[import-not-found]

from tower import db
from tower.main import build
from tower.settings import load
from tower.spec import TaskSpec

for name in ("REDIS_URL", "DATABASE_URL"):
    os.environ.pop(name, None)
os.environ.update(
    DATABASE_URL=f"sqlite:///{SQLITE}/tower.db", TRACE_DIR=OUT, TOWER_LOG_LEVEL="warning", TOWER_RUN_DIR=f"{OUT}.run", TOWER_SLOTS="16"
)

VENV = "venv-tower"
SETTINGS = "in the client's process, 16 slots, each accepted task and each end synced to the disk; events and traces on"
WORKERS: list[str] = []

app = build(load())
running = app.router.lifespan_context(app)


def finished(task_id: str) -> float:
    """Return when output.json was written: the tower's own has the time of the end, which is earlier."""
    return float(written_at(f"{OUT}/{task_id}/output.json"))


sys.modules["__main__"].finished = finished  # type: ignore[attr-defined]


async def start() -> None:
    """Start the tower."""
    await running.__aenter__()


async def submit(task: dict[str, str]) -> None:
    """Hand one task in."""
    task["id"] = await app.state.orchestrator.enqueue(TaskSpec(type="echo", payload=task))


def done() -> int:
    """Count the tasks that have ended and whose folder is complete, by indexes alone."""
    ended = "SELECT COUNT(*) FROM task WHERE status = 'succeeded'"
    return int(db.read(lambda: db.database.execute_sql(f"SELECT ({ended}) - ({ended} AND traced_seq < seq)").fetchone()[0]))
