"""What the tests of pages without a browser begin with."""

from typing import Any

from fastapi.testclient import TestClient

from tests import rows as r
from tests.conftest import BASE
from tower import db, keys, lifecycle
from tower.lifecycle import Outcome

#: The first key of a tower, and what a form of its own pages says of where it comes from.
KEY = "a-bootstrap-key-for-tests"
SAME = {"origin": BASE}


def log_in(client: TestClient, role: str, **limits: Any) -> str:
    """Begin a session of a new key, and return the token of its forms."""
    key = db.unit(lambda: keys.create(f"the {role}", role, **limits))[1]
    client.cookies.clear()
    assert client.post("/login", data={"key": key}).status_code == 303
    return str(client.get("/me").json()["csrf_token"])


def ended(status: str = "succeeded", **fields: Any) -> str:
    claim = r.running(**fields)
    error = None if status == "succeeded" else {"code": "handler_error", "message": "It broke."}
    db.unit(lambda: lifecycle.finish(claim, Outcome(status, result="{}", error=error), "t"))
    return claim.id
