"""The record of who changed what, beside the events of tasks."""

from typing import Any

from tower import db
from tower.models import Audit, new_id


def note(actor: str, action: str, target: str = "", address: str | None = None) -> None:
    """Add an entry; runs inside `db.unit`."""
    Audit.insert(id=new_id(), at=db.now(), actor=actor, action=action, target=target, address=address).execute()


def entries(before: str | None, limit: int) -> list[dict[str, Any]]:
    """Return entries, newest first, that come after the one with id `before`."""
    query = Audit.select().order_by(Audit.id.desc()).limit(limit)
    return [dict(row) for row in (query.where(Audit.id < before) if before else query).dicts()]


def has_older(days: float) -> bool:
    """Whether there are entries from before so many days."""
    return Audit.select(Audit.id).where(_older(days)).first() is not None


def forget(days: float) -> None:
    """Remove what is older; runs inside `db.unit`."""
    Audit.delete().where(_older(days)).execute()


def _older(days: float) -> Any:
    return Audit.at < db.now() - days * 86_400
