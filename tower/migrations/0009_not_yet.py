"""Tasks whose time has not come, apart from those that wait for their turn: each decision went over all of them."""

STATEMENTS = """
DROP INDEX task_waiting;
DROP INDEX task_waiting_by_lane;
CREATE INDEX task_waiting ON task (rank, id) WHERE status = 'queued' AND ready_at = 0;
CREATE INDEX task_waiting_by_lane ON task (lane, rank, id) WHERE status = 'queued' AND ready_at = 0
"""


def up(migrator, db):
    """Divide the indexes."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
