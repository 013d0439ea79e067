"""What keeps the promises under fire: start deadlines, silence, limits and rates per key, rules, and the indexes of retention and retry."""

STATEMENTS = """
ALTER TABLE task ADD COLUMN expires_at DOUBLE PRECISION;
ALTER TABLE task ADD COLUMN silence_s DOUBLE PRECISION;
ALTER TABLE task ADD COLUMN concurrency_limit INTEGER NOT NULL DEFAULT 1;
ALTER TABLE task ADD COLUMN rate_key TEXT;
ALTER TABLE task ADD COLUMN rate_limit INTEGER;
ALTER TABLE task ADD COLUMN rate_per_s DOUBLE PRECISION;
CREATE INDEX task_expiring ON task (expires_at) WHERE status IN ('queued', 'dispatched') AND expires_at IS NOT NULL;
CREATE INDEX task_by_retry ON task (retry_of) WHERE retry_of IS NOT NULL;
CREATE INDEX task_by_parent ON task (parent_id) WHERE parent_id IS NOT NULL;
CREATE INDEX task_ended ON task (status, finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX task_ended_by_type ON task (type, finished_at) WHERE status = 'succeeded';

CREATE TABLE rule (
    kind TEXT NOT NULL CHECK (kind IN ('tower', 'queue', 'type', 'key', 'rate')),
    name TEXT NOT NULL,
    max_running INTEGER,
    rate_limit INTEGER,
    rate_per_s DOUBLE PRECISION,
    paused_at DOUBLE PRECISION,
    paused_by TEXT,
    reason TEXT,
    updated_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (kind, name)
);

CREATE TABLE task_start (
    rate_key TEXT NOT NULL,
    at DOUBLE PRECISION NOT NULL,
    task_id TEXT NOT NULL,
    PRIMARY KEY (rate_key, at, task_id)
)
"""


def up(migrator, db):
    """Add the columns, tables and indexes."""
    for statement in STATEMENTS.split(";"):
        db.execute_sql(statement)
