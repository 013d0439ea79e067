"""What many clients are measured beside: a bare FastAPI, with an INSERT and a COMMIT for each request, on BARE_DATABASE_URL.

Its row has no event, no checks but of its types, and nobody does anything with it.
"""

import json
import os
import sqlite3
import threading
import time
import uuid
from typing import Any

import psycopg2  # type: ignore[import-untyped]
from fastapi import FastAPI
from pydantic import BaseModel

_TABLE = "CREATE TABLE IF NOT EXISTS bare (id TEXT PRIMARY KEY, type TEXT NOT NULL, payload TEXT NOT NULL, created_at DOUBLE PRECISION)"
_URL = os.environ["BARE_DATABASE_URL"]
_IS_SQLITE = _URL.startswith("sqlite")
_INSERT = "INSERT INTO bare VALUES (?, ?, ?, ?)" if _IS_SQLITE else "INSERT INTO bare VALUES (%s, %s, %s, %s)"
_threads = threading.local()

app = FastAPI()


class Wanted(BaseModel):
    """The body of a request."""

    type: str
    payload: dict[str, Any]
    not_before: str | None = None


def _connection() -> Any:
    """Return the connection of this thread."""
    if not hasattr(_threads, "connection"):
        _threads.connection = sqlite3.connect(_URL.removeprefix("sqlite:///"), timeout=60) if _IS_SQLITE else psycopg2.connect(_URL)
        if _IS_SQLITE:
            _threads.connection.execute("PRAGMA journal_mode = wal")
            _threads.connection.execute("PRAGMA synchronous = FULL")
    return _threads.connection


@app.post("/tasks/enqueue", status_code=202)
def enqueue(wanted: Wanted) -> dict[str, str]:
    """Keep a row."""
    task_id, connection = str(uuid.uuid4()), _connection()
    connection.cursor().execute(_INSERT, (task_id, wanted.type, json.dumps(wanted.payload), time.time()))
    connection.commit()
    return {"task_id": task_id}


_connection().cursor().execute(_TABLE)
_connection().commit()
