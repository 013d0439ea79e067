"""Only tasks below another stand in the index of trees: most tasks are the only one of theirs, and are found by their ids."""

STATEMENTS = """
DROP INDEX task_by_correlation;
CREATE INDEX task_by_correlation ON task (correlation_id) WHERE correlation_id <> id
"""


def up(migrator, db):
    """Make the index anew."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
