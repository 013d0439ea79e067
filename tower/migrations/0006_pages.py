"""What the pages keep: filters that somebody saved."""

STATEMENTS = """
CREATE TABLE saved_view (
    id TEXT NOT NULL PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    query TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL
);
CREATE UNIQUE INDEX saved_view_of_owner ON saved_view (owner, name)
"""


def up(migrator, db):
    """Make the table."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
