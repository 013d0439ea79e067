"""Where a new task waits on SQLite until it is entered among the others: a row of one table without an index, so of one page or two.

To enter it writes fourteen: of its row, its first event, and the indexes of both. Many that are entered together share most of them. Who
deletes a row from here enters its task, see docs/decisions/0016.
"""

from peewee import PostgresqlDatabase

TABLE = """
CREATE TABLE task_arrived (
    id TEXT NOT NULL,
    type TEXT NOT NULL,
    queue TEXT NOT NULL,
    payload TEXT NOT NULL,
    priority INTEGER NOT NULL,
    concurrency_limit INTEGER NOT NULL,
    lane TEXT NOT NULL,
    correlation_id TEXT NOT NULL,
    max_attempts INTEGER NOT NULL,
    max_losses INTEGER NOT NULL,
    timeout_s REAL NOT NULL,
    rank REAL NOT NULL,
    nudge_at REAL NOT NULL,
    trace_due_at REAL NOT NULL,
    created_at REAL NOT NULL,
    data TEXT NOT NULL
)
"""
#: What a task is once it is entered: columns of `task`, and what stands in them.
_BROUGHT = (
    *("id", "type", "queue", "payload", "priority", "concurrency_limit", "lane", "correlation_id", "max_attempts", "max_losses"),
    *("timeout_s", "rank", "nudge_at", "trace_due_at", "created_at"),
)
VALUES = {
    **{name: name for name in _BROUGHT},
    **dict.fromkeys(("queued_at", "updated_at"), "created_at"),
    **dict.fromkeys(("attempt", "failures", "losses", "beat", "nudges", "traced_seq", "traced_bytes", "trace_tries", "ready_at"), "0"),
    "seq": "1",
    "status": "'queued'",
    "labels": "'{}'",
}
EVENT = "id, 1, 0, created_at, 'queued', data"
#: After a commit whose answer was lost a task arrives a second time, or is there already.
TRIGGER = """
CREATE TRIGGER task_arrived_entered AFTER DELETE ON task_arrived BEGIN
    INSERT INTO task ({names}) VALUES ({values}) ON CONFLICT DO NOTHING;
    INSERT INTO task_event (task_id, seq, attempt, at, kind, data) SELECT {event} WHERE changes() > 0;
END
"""
#: What would be entered, for who reads and may not write.
VIEWS = (
    "CREATE VIEW task_arriving AS SELECT {columns} FROM task_arrived WHERE id NOT IN (SELECT id FROM task) GROUP BY id",
    "CREATE VIEW task_arriving_event AS SELECT {event} FROM task_arrived WHERE id NOT IN (SELECT id FROM task) GROUP BY id",
)


def up(migrator, db):
    """Make the table, and what enters a task that leaves it."""
    if isinstance(db, PostgresqlDatabase):
        return  # there a task is one statement either way, and a table that is emptied all the time grows
    of_task = [row[0] for row in db.execute_sql("SELECT name FROM pragma_table_info('task')").fetchall()]
    db.execute_sql(TABLE)
    db.execute_sql(TRIGGER.format(names=", ".join(VALUES), values=", ".join(map(_old, VALUES.values())), event=_old(EVENT)))
    for view in VIEWS:
        db.execute_sql(view.format(columns=", ".join(f"{VALUES.get(name, 'NULL')} AS {name}" for name in of_task), event=EVENT))


def _old(values):
    """Return values as a trigger names them."""
    return ", ".join(f"OLD.{value}" if value.isidentifier() else value for value in values.split(", "))
