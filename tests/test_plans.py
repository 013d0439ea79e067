"""What Postgres reads for the life of a task: statements are planned while the tables are empty, and their plans are kept."""

from collections.abc import Callable

import pytest

from actors.orchestrator import Dispatcher
from tests import rows as r
from tower import db, lifecycle, queries, reminders
from tower.lifecycle import Ending, Outcome
from tower.models import SUCCEEDED, Task, new_id
from tower.settings import Settings

_HISTORY = 3000
_COPY = """
INSERT INTO task ({columns}) SELECT {values} FROM task, generate_series(1, {count}) AS n WHERE task.id = '{id}'
"""


def _live(dispatcher: Dispatcher) -> str:
    """Bring some tasks from their request to their folders, together; return the id of one."""
    ids = [r.insert() for _ in range(3)]
    assert dispatcher.run_pass(ids) == 3
    claims = db.unit(lambda: lifecycle.claim_some("w1", new_id(), 3, ["default"]))
    assert [claim.id for claim in claims] == ids
    db.unit(lambda: lifecycle.finish_all([Ending(claim, Outcome(SUCCEEDED), new_id()) for claim in claims]))
    told = db.read(lambda: queries.to_trace(ids))
    db.unit(lambda: reminders.traced([(task_id, told[task_id]["task"]["seq"], 1) for task_id in ids]))
    return ids[0]


def _read_so_far() -> int:
    """Return how many entries of indexes and rows of tables were read, by this connection and those before it."""
    db.rows("SELECT pg_stat_force_next_flush()")
    indexes = "SELECT coalesce(sum(idx_tup_read), 0) FROM pg_stat_user_indexes"
    tables = "SELECT coalesce(sum(seq_tup_read), 0) FROM pg_stat_user_tables"
    return int(db.rows(f"SELECT ({indexes}) + ({tables}) AS count")[0]["count"])


@pytest.mark.parametrize("others", ["ended", "waiting"])
def test_the_life_of_a_task_reads_neither_what_has_ended_nor_all_that_waits(new_database: Callable[[], str], others: str) -> None:
    """However little there was when its statements were planned."""
    settings = Settings(database_url=new_database())
    db.open_database(settings)
    try:
        db.migrate()
        r.add_worker(slots=3)
        dispatcher = Dispatcher(settings, r.Nudges())  # type: ignore[arg-type]
        for _ in range(4):
            model = _live(dispatcher)
        if others == "waiting":
            model = r.insert(queue="of nobody")
        names = [field.column_name for field in Task._meta.sorted_fields]
        values = ", ".join("id || n" if name == "id" else name for name in names)
        db.unit(lambda: db.database.execute_sql(_COPY.format(columns=", ".join(names), values=values, count=_HISTORY, id=model)))
        before = db.read(_read_so_far)
        _live(dispatcher)
        assert db.read(_read_so_far) - before < _HISTORY / 2
    finally:
        db.close_database()
