"""/me, /access/keys and /access/audit: who asks, the keys that open the tower, and the record of who did what."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from tower import audit, db, keys
from tower.api.access import caller_of
from tower.api.errors import problems
from tower.api.session import COOKIE
from tower.api.strict import StrictRoute
from tower.spec import Labels, Line, Text, Time
from tower.trace import rfc3339

router = APIRouter(tags=["access"], route_class=StrictRoute)

_KEY_ID = "twr_0123456789"
KeyId = Annotated[str, Path(pattern=r"^twr_[0-9a-f]{10}$", description="What the key begins with.", examples=[_KEY_ID])]
Role = Annotated[Literal["viewer", "operator", "admin"], Field(examples=["operator"])]
_ENTRY_ID = "0192f0c1-2345-7abc-8def-0123456789ab"


class Me(BaseModel):
    """Who asks, and what he may do."""

    name: str = Field(examples=["ci"])
    role: str = Field(examples=["operator"])
    key_id: str | None = Field(description="None if no key was shown.", examples=[_KEY_ID])
    types: list[str] = Field(description="The only types it has to do with; empty is all.", examples=[[]])
    labels: dict[str, str] = Field(description="The labels that its tasks carry.", examples=[{}])
    csrf_token: str | None = Field(description="What changes of this browser session carry as X-CSRF-Token.", examples=[None])


class NewKey(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid")

    name: Line = Field(description="Whose it is, for the record.", examples=["ci"])
    role: Role = Field(description="viewer: look; operator: also run, stop and pause; admin: everything.")
    types: list[Text] = Field([], max_length=100, description="Limit it to these types.", examples=[["command"]])
    labels: Labels = Field({}, description="Limit it to tasks with all these labels.", examples=[{"team": "platform"}])
    expires_at: Time | None = Field(None, description="From when it opens nothing any more.", examples=["2031-05-01T08:00:00Z"])


class KeyInfo(BaseModel):
    """A key, by which it is recognised and not by which it opens."""

    id: str = Field(examples=[_KEY_ID])
    name: str = Field(examples=["ci"])
    role: str = Field(examples=["operator"])
    types: list[str] = Field(examples=[[]])
    labels: dict[str, str] = Field(examples=[{}])
    created_at: str = Field(examples=["2031-05-01T08:00:00.000Z"])
    created_by: str | None = Field(examples=["bootstrap"])
    expires_at: str | None = Field(examples=[None])
    revoked_at: str | None = Field(examples=[None])
    used_at: str | None = Field(description="When it was used last, to a minute.", examples=[None])


class MadeKey(KeyInfo):
    """A new key; `key` is told this once."""

    key: str = Field(examples=["twr_0123456789_…"])


class KeyList(BaseModel):
    """All keys, newest first."""

    keys: list[KeyInfo]


class AuditEntry(BaseModel):
    """One change."""

    id: str = Field(examples=[_ENTRY_ID])
    at: str = Field(examples=["2031-05-01T08:00:00.000Z"])
    actor: str = Field(examples=["ci"])
    action: str = Field(examples=["POST /pause"])
    target: str = Field(examples=["reason=release"])
    address: str | None = Field(examples=["127.0.0.1"])


class AuditPage(BaseModel):
    """Changes, newest first."""

    entries: list[AuditEntry]
    next_cursor: str | None = Field(description="Give it as `cursor` for those before; null if there are none.", examples=[None])


def _told(row: dict[str, Any]) -> dict[str, Any]:
    times = {name: rfc3339(row[name]) for name in ("created_at", "expires_at", "revoked_at", "used_at")}
    return {**row, **times, "types": json.loads(row["types"]), "labels": json.loads(row["labels"])}


@router.get("/me", response_model=Me, responses=problems(422, 503), summary="Who am I?")
def me(request: Request) -> dict[str, Any]:
    """Tell whose key was shown and what it may do."""
    caller, cookie = caller_of(request), request.cookies.get(COOKIE)
    token = request.app.state.sessions.token(cookie) if cookie and caller.key_id else None
    told = {"name": caller.name, "role": caller.role, "key_id": caller.key_id}
    return {**told, "types": list(caller.types), "labels": dict(caller.labels), "csrf_token": token}


@router.get("/access/keys", response_model=KeyList, responses=problems(422, 503), summary="The keys that open this tower")
def key_list() -> dict[str, Any]:
    """List all keys, also those that open nothing any more."""
    return {"keys": [_told(row) for row in db.read(keys.listed)]}


@router.post("/access/keys", status_code=201, response_model=MadeKey, responses=problems(400, 413, 415, 422, 503), summary="Make a key")
def make_key(request: Request, asked: NewKey) -> dict[str, Any]:
    """Make a key and tell it, which happens this once: the tower itself keeps only what recognises it."""
    expires_at = asked.expires_at.timestamp() if asked.expires_at else None
    limits: dict[str, Any] = {"types": asked.types, "labels": asked.labels, "expires_at": expires_at}
    row, key = db.unit(lambda: keys.create(asked.name, asked.role, **limits, by=caller_of(request).name))
    request.state.recorded = f"{row['id']} {row['name']}"
    return {**_told(row), "key": key}


@router.delete("/access/keys/{key_id}", response_model=KeyInfo, responses=problems(404, 413, 415, 422, 503), summary="Revoke a key")
def revoke_key(key_id: KeyId) -> dict[str, Any]:
    """Let a key open nothing any more, from the next request on, whichever server that reaches."""
    return _told(db.unit(lambda: keys.revoke(key_id)))


@router.get("/access/audit", response_model=AuditPage, responses=problems(422, 503), summary="Who changed what")
def audit_page(
    cursor: Annotated[
        str | None, Query(pattern=r"^[0-9a-f-]{36}$", description="`next_cursor` of the page before.", examples=[_ENTRY_ID])
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Entries per page.")] = 50,
) -> dict[str, Any]:
    """List changes, newest first. What was done to a task is also among its events."""
    rows = db.read(lambda: audit.entries(cursor, limit + 1))
    told = [{**row, "at": rfc3339(row["at"])} for row in rows[:limit]]
    return {"entries": told, "next_cursor": rows[limit - 1]["id"] if len(rows) > limit else None}
