"""The way in for new tasks on SQLite: one statement writes a task and its first event, so that no transaction is needed around it."""

from peewee import PostgresqlDatabase

COLUMNS = """
id, type, queue, title, payload, labels, requested_by, priority, not_before, expires_at, concurrency_key, concurrency_limit, rate_key,
rate_limit, rate_per_s, lane, idempotency_key, idempotency_hash, parent_id, correlation_id, retry_of, max_attempts, max_losses, timeout_s,
silence_s, status, attempt, failures, losses, beat, nudges, traced_seq, traced_bytes, trace_tries, seq, rank, ready_at, nudge_at,
trace_due_at, created_at, queued_at, updated_at
"""

VIEW = "CREATE VIEW task_entry AS SELECT {columns}, '' AS kind, '' AS data FROM task"
TRIGGER = """
CREATE TRIGGER task_entry_made INSTEAD OF INSERT ON task_entry BEGIN
    INSERT INTO task ({columns}) VALUES ({given}) ON CONFLICT DO NOTHING;
    INSERT INTO task_event (task_id, seq, attempt, at, kind, data)
    SELECT NEW.id, NEW.seq, NEW.attempt, NEW.created_at, NEW.kind, NEW.data WHERE changes() > 0;
END
"""


def up(migrator, db):
    """Make a view of what a new task brings along and what its first event says, and what an insert into it does."""
    if isinstance(db, PostgresqlDatabase):
        return  # there a statement can do both by itself
    given = ", ".join(f"NEW.{name.strip()}" for name in COLUMNS.split(","))
    for statement in (VIEW, TRIGGER):
        db.execute_sql(statement.format(columns=COLUMNS, given=given))
