"""On Postgres, no constraint on the words for statuses: its text is read and planned anew for each statement that writes a task.

That took a twentieth of what it costs to take a task in. Statuses are words of the statements themselves, each after those that it may
follow; see `moves.change`.
"""

from peewee import PostgresqlDatabase


def up(migrator, db):
    """Drop the constraint; SQLite keeps it, since it is compiled with the statement there."""
    if isinstance(db, PostgresqlDatabase):
        db.execute_sql("ALTER TABLE task DROP CONSTRAINT IF EXISTS task_status_check")
