"""On Postgres too a new task waits in a table without an index, until it is entered among the others or starts from there.

See 0013, which made that table on SQLite, and docs/decisions/0017. Here a statement enters what it deletes, and no trigger, since a task
that starts at once is entered as running.
"""

from peewee import PostgresqlDatabase

TABLE = """
CREATE TABLE task_arrived (
    id TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    queue TEXT COLLATE "C" NOT NULL,
    payload TEXT COLLATE "C" NOT NULL,
    priority INTEGER NOT NULL,
    concurrency_limit INTEGER NOT NULL,
    lane TEXT COLLATE "C" NOT NULL,
    correlation_id TEXT COLLATE "C" NOT NULL,
    max_attempts INTEGER NOT NULL,
    max_losses INTEGER NOT NULL,
    timeout_s DOUBLE PRECISION NOT NULL,
    rank DOUBLE PRECISION NOT NULL,
    nudge_at DOUBLE PRECISION NOT NULL,
    trace_due_at DOUBLE PRECISION NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    data TEXT COLLATE "C" NOT NULL
)
"""


def up(migrator, db):
    """Make the table; on SQLite remove two views that nothing reads any more."""
    if isinstance(db, PostgresqlDatabase):
        db.execute_sql(TABLE)
        return
    for view in ("task_arriving", "task_arriving_event"):
        db.execute_sql(f"DROP VIEW IF EXISTS {view}")
