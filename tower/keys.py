"""API keys: who may come in, and what they may do. A key is told once; rows hold only what recognises it."""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tower import db
from tower.errors import InvalidKey, NotFound, Refused
from tower.models import ApiKey
from tower.terms import ADMIN, ROLES

ANONYMOUS, BOOTSTRAP = "anonymous", "bootstrap"

#: `used_at` is written again after so many seconds.
_USED_S = 60.0
_KEY = re.compile(r"(twr_[0-9a-f]{10})_([A-Za-z0-9_-]{43})")
_NO_DIGEST = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str
    role: str
    key_id: str | None = None
    #: What it is limited to; nothing is everything.
    types: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    def may(self, role: str) -> bool:
        """Whether it may do what takes this role."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def is_limited(self) -> bool:
        """Whether it has to do with some tasks only."""
        return bool(self.types or self.labels)

    @property
    def actor(self) -> str | None:
        """Return who did it, for the record; None if nobody showed a key."""
        return self.name if self.key_id else None

    def covers(self, type_name: str, labels: Mapping[str, str]) -> bool:
        """Whether it has to do with such a task."""
        return (not self.types or type_name in self.types) and all(labels.get(name) == value for name, value in self.labels)


def create(
    name: str,
    role: str,
    *,
    types: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    expires_at: float | None = None,
    by: str | None = None,
) -> tuple[dict[str, Any], str]:
    """Make a key; return its row, and the key, which nobody can ever ask for again. Raises InvalidKey; runs inside `db.unit`."""
    if role == ADMIN and (types or labels):
        raise InvalidKey("An admin can make any key, so limits would not hold; make it an operator or a viewer.", field="role")
    if expires_at is not None and expires_at <= db.clock():
        raise InvalidKey("expires_at has passed already; give a later time.", field="expires_at")
    key_id, secret = f"twr_{secrets.token_hex(5)}", secrets.token_urlsafe(32)
    limits = {"types": json.dumps(list(types)), "labels": json.dumps(labels or {}, ensure_ascii=False)}
    row = {"id": key_id, "digest": _digest(secret), "name": name, "role": role, **limits, "expires_at": expires_at, "created_by": by}
    ApiKey.insert(**row, created_at=db.now()).execute()
    return find(key_id), f"{key_id}_{secret}"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def find(key_id: str) -> dict[str, Any]:
    """Return one key; raise NotFound."""
    row = ApiKey.select().where(ApiKey.id == key_id).dicts().first()
    if row is None:
        raise NotFound(f"There is no key {key_id!r}; GET /access/keys lists them.", code="key_not_found")
    return dict(row)


def listed() -> list[dict[str, Any]]:
    """Return all keys, newest first."""
    return [dict(row) for row in ApiKey.select().order_by(ApiKey.created_at.desc(), ApiKey.id).dicts()]


def revoke(key_id: str) -> dict[str, Any]:
    """Let a key open nothing any more, from this moment, in every process; raise NotFound. Runs inside `db.unit`."""
    ApiKey.update(revoked_at=db.now()).where(ApiKey.id == key_id, ApiKey.revoked_at.is_null()).execute()
    return find(key_id)


def recognise(key: str, bootstrap: str | None) -> Caller:
    """Return whose key this is; raise Refused if it opens nothing. Runs inside `db.read`."""
    if bootstrap and hmac.compare_digest(key.encode(), bootstrap.encode()):
        return Caller(BOOTSTRAP, ADMIN, BOOTSTRAP)
    match = _KEY.fullmatch(key)
    row = ApiKey.select().where(ApiKey.id == (match[1] if match else "")).dicts().first()
    # An unknown key takes as long as a wrong one.
    fits = hmac.compare_digest(_digest(match[2] if match else ""), row["digest"] if row else _NO_DIGEST)
    if not (match and row and fits):
        raise Refused("The key is not known here; check it, or ask an admin for a new one.", code="invalid_key")
    return caller(dict(row))


def remembered(key_id: str) -> Caller:
    """Return whose key has this id, as a session knows it; raise Refused if it opens nothing any more."""
    row = ApiKey.select().where(ApiKey.id == key_id).dicts().first()
    if row is None:
        raise Refused("The key of this session is gone; log in again.", code="invalid_key")
    return caller(dict(row))


def caller(row: dict[str, Any]) -> Caller:
    """Return who has this key; raise Refused if it was revoked or has expired."""
    if row["revoked_at"] is not None:
        raise Refused(f"The key {row['id']} was revoked; ask an admin for a new one.", code="key_revoked")
    now = db.clock()
    if row["expires_at"] is not None and row["expires_at"] <= now:
        raise Refused(f"The key {row['id']} has expired; ask an admin for a new one.", code="key_expired")
    if row["used_at"] is None or now - row["used_at"] > _USED_S:
        db.unit(lambda: ApiKey.update(used_at=db.now()).where(ApiKey.id == row["id"]).execute(), is_promise=False)
    labels = tuple(json.loads(row["labels"]).items())
    return Caller(row["name"], row["role"], row["id"], tuple(json.loads(row["types"])), labels)
