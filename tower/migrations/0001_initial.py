"""The first schema: tasks with their labels, events, log chunks and artifacts, and workers."""

from peewee import PostgresqlDatabase

TABLES = """
CREATE TABLE task (
    id TEXT NOT NULL PRIMARY KEY,
    type TEXT NOT NULL,
    queue TEXT NOT NULL,
    title TEXT,
    payload TEXT NOT NULL,
    labels TEXT NOT NULL,
    requested_by TEXT,
    status TEXT NOT NULL CHECK (status IN
        ('queued', 'dispatched', 'running', 'succeeded', 'failed', 'cancelled', 'timed_out')),
    priority INTEGER NOT NULL,
    rank DOUBLE PRECISION NOT NULL,
    not_before DOUBLE PRECISION,
    ready_at DOUBLE PRECISION NOT NULL,
    concurrency_key TEXT,
    idempotency_key TEXT UNIQUE,
    idempotency_hash TEXT,
    parent_id TEXT,
    correlation_id TEXT NOT NULL,
    retry_of TEXT,
    attempt INTEGER NOT NULL,
    failures INTEGER NOT NULL,
    losses INTEGER NOT NULL,
    max_attempts INTEGER NOT NULL,
    max_losses INTEGER NOT NULL,
    timeout_s DOUBLE PRECISION NOT NULL,
    worker_id TEXT,
    claim_token TEXT,
    finish_token TEXT,
    beat INTEGER NOT NULL,
    cancel_requested_at DOUBLE PRECISION,
    nudges INTEGER NOT NULL,
    nudge_at DOUBLE PRECISION NOT NULL,
    result TEXT,
    error_code TEXT,
    error TEXT,
    seq INTEGER NOT NULL,
    traced_seq INTEGER NOT NULL,
    traced_bytes BIGINT NOT NULL,
    trace_tries INTEGER NOT NULL,
    trace_due_at DOUBLE PRECISION NOT NULL,
    trace_error TEXT,
    created_at DOUBLE PRECISION NOT NULL,
    queued_at DOUBLE PRECISION NOT NULL,
    dispatched_at DOUBLE PRECISION,
    started_at DOUBLE PRECISION,
    finished_at DOUBLE PRECISION,
    updated_at DOUBLE PRECISION NOT NULL
) {task_storage};
CREATE INDEX task_waiting ON task (rank, id) WHERE status = 'queued';
CREATE INDEX task_not_yet ON task (ready_at) WHERE status = 'queued' AND ready_at > 0;
CREATE INDEX task_in_flight ON task (status, queue) WHERE status IN ('dispatched', 'running');
CREATE INDEX task_untraced ON task (trace_due_at) WHERE traced_seq < seq;
CREATE INDEX task_by_status ON task (status, id);
CREATE INDEX task_by_type ON task (type, id);
CREATE INDEX task_by_correlation ON task (correlation_id);

CREATE TABLE task_label (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (task_id, key)
);
CREATE INDEX task_label_value ON task_label (key, value, task_id);

CREATE TABLE task_event (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    at DOUBLE PRECISION NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (task_id, seq)
);

CREATE TABLE task_log (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    part INTEGER NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (task_id, seq),
    UNIQUE (task_id, attempt, part)
);

CREATE TABLE task_artifact (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    part INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    data {blob} NOT NULL,
    PRIMARY KEY (task_id, name, part)
);

CREATE TABLE worker (
    id TEXT NOT NULL PRIMARY KEY,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    pid_space TEXT NOT NULL,
    pid_started DOUBLE PRECISION NOT NULL,
    slots INTEGER NOT NULL,
    queues TEXT NOT NULL,
    version TEXT NOT NULL,
    started_at DOUBLE PRECISION NOT NULL,
    beat_at DOUBLE PRECISION NOT NULL
)
"""


def up(migrator, db):
    """Make every table and index."""
    postgres = isinstance(db, PostgresqlDatabase)
    # A heartbeat rewrites the row every second: free space on the page keeps that off the indexes.
    variant = {"blob": "BYTEA", "task_storage": "WITH (fillfactor = 80)"} if postgres else {"blob": "BLOB", "task_storage": ""}
    for statement in TABLES.format(**variant).split(";"):
        db.execute_sql(statement)
