"""Filters that somebody saved under a name, for whoever has the same key."""

from typing import Any

from tower import db
from tower.errors import InvalidTask
from tower.keys import ANONYMOUS, Caller
from tower.models import SavedView, new_id

#: Views that one key can save.
_MOST = 50


def listed(caller: Caller) -> list[dict[str, Any]]:
    """Return the views of whoever asks, by name. Runs inside `db.read`."""
    query = SavedView.select().where(SavedView.owner == _owner(caller)).order_by(SavedView.name)
    return [dict(row) for row in query.dicts()]


def save(caller: Caller, name: str, query: str) -> None:
    """Save a filter, in place of one of the same name; raise InvalidTask. Runs inside `db.unit`."""
    if not (name and len(name) <= 80 and name.isprintable()):
        raise InvalidTask("A view has a name of 1 to 80 characters on one line.", code="invalid_field", field="name")
    mine = SavedView.select().where(SavedView.owner == _owner(caller), SavedView.name != name)
    if mine.count() >= _MOST:
        raise InvalidTask(f"There are {_MOST} views already; remove one first.", code="invalid_field", field="name")
    row = SavedView.insert(id=new_id(), owner=_owner(caller), name=name, query=query[:2000], created_at=db.now())
    row.on_conflict(conflict_target=[SavedView.owner, SavedView.name], update={SavedView.query: query[:2000]}).execute()


def remove(caller: Caller, name: str) -> None:
    """Forget a view; nothing happens if there is none. Runs inside `db.unit`."""
    SavedView.delete().where(SavedView.owner == _owner(caller), SavedView.name == name).execute()


def _owner(caller: Caller) -> str:
    return caller.key_id or ANONYMOUS
