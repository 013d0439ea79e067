"""The index that finds old starts."""


def up(migrator, db):
    """Add the index."""
    db.execute_sql("CREATE INDEX task_start_by_time ON task_start (at)")
