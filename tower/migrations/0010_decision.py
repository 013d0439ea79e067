"""What was decided last: passes take no lock any more while they look, and find out at their end whether others decided meanwhile."""


def up(migrator, db):
    """Make the table with its one row."""
    db.execute_sql("CREATE TABLE decision (id INTEGER NOT NULL PRIMARY KEY, token BIGINT NOT NULL)")
    db.execute_sql("INSERT INTO decision (id, token) VALUES (1, 0)")
