"""Lanes, by which a crowd behind one full key or rate is passed over at once."""

STATEMENTS = """
ALTER TABLE task ADD COLUMN lane TEXT NOT NULL DEFAULT '';
UPDATE task SET lane = id WHERE status IN ('queued', 'dispatched', 'running');
CREATE INDEX task_waiting_by_lane ON task (lane, rank, id) WHERE status = 'queued'
"""


def up(migrator, db):
    """Add the column and its index; what waits already gets a lane of its own."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
