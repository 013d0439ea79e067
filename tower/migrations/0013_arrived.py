"""Where a new task waits on SQLite until it is entered among the others: a row of one table without an index, so of one page or two.

To enter it writes thirteen: of its row, its first event, and the indexes of both. Many that are entered together share most of them. Who
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
#: After a commit whose answer was lost a task arrives a second time, or is there already.
TRIGGER = """
CREATE TRIGGER task_arrived_entered AFTER DELETE ON task_arrived BEGIN
    INSERT INTO task (
        id, type, queue, payload, labels, priority, concurrency_limit, lane, correlation_id, max_attempts, max_losses, timeout_s,
        status, attempt, failures, losses, beat, nudges, traced_seq, traced_bytes, trace_tries, seq,
        rank, ready_at, nudge_at, trace_due_at, created_at, queued_at, updated_at
    ) VALUES (
        OLD.id, OLD.type, OLD.queue, OLD.payload, '{}', OLD.priority, OLD.concurrency_limit, OLD.lane, OLD.correlation_id,
        OLD.max_attempts, OLD.max_losses, OLD.timeout_s,
        'queued', 0, 0, 0, 0, 0, 0, 0, 0, 1,
        OLD.rank, 0, OLD.nudge_at, OLD.trace_due_at, OLD.created_at, OLD.created_at, OLD.created_at
    ) ON CONFLICT DO NOTHING;
    INSERT INTO task_event (task_id, seq, attempt, at, kind, data)
    SELECT OLD.id, 1, 0, OLD.created_at, 'queued', OLD.data WHERE changes() > 0;
END
"""


def up(migrator, db):
    """Make the table, and what enters a task that leaves it."""
    if isinstance(db, PostgresqlDatabase):
        return  # there a task is one statement either way, and a table that is emptied all the time grows
    for statement in (TABLE, TRIGGER):
        db.execute_sql(statement)
