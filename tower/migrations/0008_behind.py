"""Folders that lag behind, apart from those of tasks that only wait: a crowd of these stood between an end and its folder."""

STATEMENTS = """
DROP INDEX task_untraced;
CREATE INDEX task_untraced ON task (trace_due_at) WHERE traced_seq < seq AND status NOT IN ('queued', 'dispatched');
CREATE INDEX task_untraced_waiting ON task (trace_due_at) WHERE traced_seq < seq AND status IN ('queued', 'dispatched')
"""


def up(migrator, db):
    """Divide the index."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
