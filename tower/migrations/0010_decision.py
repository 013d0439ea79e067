"""What was decided last: passes take no lock any more while they look, and find out at their end whether others decided meanwhile."""


def up(migrator, db):
    """Make the table; its one row comes with the first decision."""
    db.execute_sql("CREATE TABLE decision (id INTEGER NOT NULL PRIMARY KEY, number BIGINT NOT NULL)")
