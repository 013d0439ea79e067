"""The record of who changed what, beside the events of tasks."""

import math
from typing import Any

from tower import db
from tower.models import CLOCKS_DIFFER_S, Audit, first_id, new_id

_DAY_S = 86_400.0
#: Old entries are looked for by their ids, which have an index: of so many that come first one is the oldest.
_FIRST = 100


def note(actor: str, action: str, target: str = "", address: str | None = None) -> None:
    """Add an entry; runs inside `db.unit`."""
    Audit.insert(id=new_id(), at=db.now(), actor=actor, action=action, target=target, address=address).execute()


def entries(before: str | None, limit: int) -> list[dict[str, Any]]:
    """Return entries, newest first, that come after the one with id `before`."""
    query = Audit.select().order_by(Audit.id.desc()).limit(limit)
    return [dict(row) for row in (query.where(Audit.id < before) if before else query).dicts()]


def has_older(days: float) -> bool:
    """Whether there are entries from before so many days."""
    first = Audit.select(Audit.at).order_by(Audit.id).limit(_FIRST).tuples()
    return min((at for (at,) in first), default=math.inf) < db.clock() - days * _DAY_S


def forget(days: float) -> None:
    """Remove what is older; runs inside `db.unit`."""
    until = db.clock() - days * _DAY_S
    Audit.delete().where(Audit.id < first_id(until + CLOCKS_DIFFER_S), Audit.at < until).execute()
