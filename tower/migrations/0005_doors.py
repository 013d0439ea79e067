"""API keys, and the record of who did what."""

STATEMENTS = """
CREATE TABLE api_key (
    id TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL,
    name TEXT NOT NULL,
    role TEXT NOT NULL,
    types TEXT NOT NULL,
    labels TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    created_by TEXT,
    expires_at DOUBLE PRECISION,
    revoked_at DOUBLE PRECISION,
    used_at DOUBLE PRECISION
);
CREATE TABLE audit (
    id TEXT NOT NULL PRIMARY KEY,
    at DOUBLE PRECISION NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    address TEXT
)
"""


def up(migrator, db):
    """Make the tables."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
