"""The tower on Postgres and Redis: an engine in the client, a server, and a worker process."""

import os
import sys

from common import OUT, PG, REDIS  # type: ignore[import-not-found]
from contenders.dates import written_at  # type: ignore[import-not-found]

from actors.crew import Crew
from actors.handlers import load as load_handlers
from tower import db
from tower.broker import Nudger, open_broker
from tower.orchestrator import EnhancedOrchestrator
from tower.settings import load
from tower.spec import TaskSpec

# The environment is inherited by the server and the workers, and read when settings are loaded here.
os.environ.update(
    DATABASE_URL=PG, REDIS_URL=f"{REDIS}/0", TRACE_DIR=OUT, PORT="8390", TOWER_LOG_LEVEL="warning", TOWER_RUN_DIR=f"{OUT}.run"
)

VENV = "venv-tower"
SETTINGS = "engine in the client, server, 1 worker process x 32 slots; synchronous_commit on, events and traces on"
# As many slots as tasks are worth to be claimed and recorded together: these tasks run one after the other in one thread.
WORKERS = ["python -m devops_control_tower.main", "dramatiq tower.actors --processes 1 --threads 32"]
BOOT = 6

settings = load()
db.open_database(settings)
registry, broker = load_handlers(), open_broker(settings)
Crew(settings, registry, broker)  # so that the names of actors are known; nothing runs here
engine = EnhancedOrchestrator(settings, registry, Nudger(broker))
accepted: list[str] = []
_NOT_SUCCEEDED = "SELECT COUNT(*) FROM task WHERE status IN ('queued', 'dispatched', 'running', 'failed', 'cancelled', 'timed_out')"
_NOT_TRACED = "SELECT COUNT(*) FROM task WHERE traced_seq < seq AND status NOT IN ('queued', 'dispatched')"


def finished(task_id: str) -> float:
    """Return when output.json was written: the tower's own has the time of the end, which is earlier."""
    return float(written_at(f"{OUT}/{task_id}/output.json"))


sys.modules["__main__"].finished = finished  # type: ignore[attr-defined]


async def start() -> None:
    """Open the client."""
    await engine.start()


async def submit(task: dict[str, str]) -> None:
    """Hand one task in."""
    task["id"] = await engine.enqueue(TaskSpec(type="echo", payload=task))
    accepted.append(task["id"])


def done() -> int:
    """Count the tasks that succeeded and have their folder: by those that have not, which takes no longer with more, until none is left."""
    left = _ask(f"SELECT ({_NOT_SUCCEEDED}) + ({_NOT_TRACED})")
    return len(accepted) - left if left else _ask("SELECT COUNT(*) FROM task WHERE status = 'succeeded' AND traced_seq >= seq")


def _ask(statement: str) -> int:
    return int(db.read(lambda: db.database.execute_sql(statement).fetchone()[0]))
