"""What the buttons do. Each runs in a thread, after its form was checked to come from a page of this tower."""

from typing import Any
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams

from tower import db, keys, queries, views
from tower.bulk import Done as Changed
from tower.decision import KEY, QUEUE, RATE, TOWER, TYPE
from tower.errors import Conflict, InvalidKey, InvalidTask, NotFound, TowerError
from tower.models import Task
from tower.queries import Filter
from tower.spec import Key
from tower.terms import BROKEN, IN_FLIGHT, QUEUED, ROLES
from tower.ui import facts
from tower.ui.forms import Again, Done, Fields, local
from tower.ui.page import Page, Visit
from tower.ui.schema import number, whole
from tower.ui.task import told

#: Tasks that are picked one by one at most.
_PICKED = 500
_KEY: TypeAdapter[str] = TypeAdapter(Key)
CANCEL, RETRY = "cancel", "retry"

CONFIRM = Page("confirm.html", facts.confirm)
KEYS = Page("keys.html", facts.key_list)


def cancel(visit: Visit, sent: Fields) -> Done:
    """Cancel one task."""
    task_id = visit.values["task_id"]
    visit.orchestrator.cancel(task_id, visit.caller.actor)
    return Done(local(sent.one("next"), f"/ui/tasks/{task_id}"), "cancel", task_id)


def retry(visit: Visit, sent: Fields) -> Done:
    """Enqueue a copy of a final task, and go there."""
    task_id = visit.values["task_id"]
    accepted = visit.orchestrator.retry(task_id, visit.caller.actor)
    return Done(f"/ui/tasks/{accepted.id}", "retry", task_id)


def change_many(visit: Visit, sent: Fields) -> Done | Again:
    """Cancel or retry what was picked, or all that fits the filter: first say how many, and do it once that is confirmed."""
    what, filters = sent.one("do"), sent.one("filters")
    if what not in (CANCEL, RETRY):
        raise InvalidTask(f"There is nothing called {what[:80]!r} to do; it is cancel or retry.", code="invalid_field", field="do")
    picked = sent.all("id")[:_PICKED]
    place = f"/ui/tasks?{filters}" if filters else "/ui/tasks"
    is_all = sent.one("all") == "yes"
    if not is_all and not picked:
        raise InvalidTask("No task is picked; tick some, or choose all that fit the filter.", code="invalid_field", field="id")
    chosen = facts.chosen(QueryParams(parse_qsl(filters)), visit.within)
    if sent.one("confirmed") != "yes":
        fit = _try(visit, what, chosen) if is_all else _fitting(visit, what, picked)
        said = {
            "what": what,
            "count": fit.matched,
            "ids": [] if is_all else fit.task_ids,
            "is_all": is_all,
            "filters": filters,
            "place": place,
        }
        return Again(CONFIRM, {**said, "rows": _some(visit, fit.task_ids[:20])})
    if is_all:
        many = visit.orchestrator.cancel_all if what == CANCEL else visit.orchestrator.retry_all
        changed = many(chosen, visit.caller.actor).changed
    else:
        changed = sum(_one(visit, what, task_id) for task_id in _fitting(visit, what, picked).task_ids)
    told = f"{changed} task{'' if changed == 1 else 's'}"
    return Done(f"{place}{'&' if filters else '?'}said={what}-{changed}", what, f"{told} ({filters or 'picked'})"[:500])


def _try(visit: Visit, what: str, chosen: Filter) -> Changed:
    many = visit.orchestrator.cancel_all if what == CANCEL else visit.orchestrator.retry_all
    return many(chosen, visit.caller.actor, dry_run=True)


def _fitting(visit: Visit, what: str, picked: list[str]) -> Changed:
    """Return which of the tasks that were picked can be changed so, and may be by whoever asks."""
    can = Task.status << (BROKEN if what == RETRY else (QUEUED, *IN_FLIGHT))
    conditions = [Task.id << picked, can, *queries.conditions(visit.within)]
    if what == RETRY:
        conditions.append(~queries.is_repeated())
    ids = db.read(lambda: [row[0] for row in Task.select(Task.id).where(*conditions).order_by(Task.id).tuples()])
    return Changed(len(ids), 0, ids, dry_run=True)


def _some(visit: Visit, ids: list[str]) -> list[dict[str, Any]]:
    return [told(row) for row in sorted(db.read(lambda: queries.some(ids)), key=lambda row: str(row["id"]))]


def _one(visit: Visit, what: str, task_id: str) -> bool:
    try:
        if what == CANCEL:
            visit.orchestrator.cancel(task_id, visit.caller.actor)
        else:
            visit.orchestrator.retry(task_id, visit.caller.actor)
    except (Conflict, NotFound):  # it has ended meanwhile, or is gone: nothing to do
        return False
    return True


def pause(visit: Visit, sent: Fields) -> Done:
    """Pause or resume the tower, a queue, a type or a concurrency key."""
    (kind, name), what = _named(sent, (TOWER, QUEUE, TYPE, KEY)), sent.one("do")
    rules = visit.orchestrator.rules
    if what == "pause":
        rules.pause(kind, name, visit.caller.actor, sent.one("reason")[:200] or None)
    else:
        rules.resume(kind, name, visit.caller.actor)
    return Done(local(sent.one("next"), "/ui/fleet"), what if what == "pause" else "resume", f"{kind} {name}".strip())


def limit(visit: Visit, sent: Fields) -> Done:
    """Set or lift a limit."""
    kind, name = _named(sent, (TOWER, QUEUE, TYPE, KEY, RATE))
    rules = visit.orchestrator.rules
    if sent.one("do") == "lift":
        rules.lift_limit(kind, name)
        return Done("/ui/fleet", "lift limit", f"{kind} {name}".strip())
    most = whole("max_running", sent.one("max_running") or "0")
    if kind == RATE:
        per_s = number("per_s", sent.one("per_s") or "0")
        rules.set_limit(kind, name, rate=(most, float(per_s)))
        return Done("/ui/fleet", "set limit", f"{kind} {name}: {most} per {per_s} s")
    rules.set_limit(kind, name, max_running=most)
    return Done("/ui/fleet", "set limit", f"{kind} {name}: {most}".strip())


def _named(sent: Fields, kinds: tuple[str, ...]) -> tuple[str, str]:
    """Return what a rule is about; what is about the tower has no name."""
    kind = sent.one("kind")
    if kind not in kinds:
        raise InvalidTask(f"There is no kind {kind[:80]!r}; known: {', '.join(kinds)}.", code="invalid_field", field="kind")
    name = sent.one("name")
    if kind == TOWER:
        return kind, ""
    try:
        return kind, _KEY.validate_python(name)
    except ValidationError:
        said = f"The name of a {kind} has 1 to 255 characters on one line, got {name[:80]!r}."
        raise InvalidTask(said, code="invalid_field", field="name") from None


def make_key(visit: Visit, sent: Fields) -> Again:
    """Make a key, and show it this once."""
    fields = {name: sent.one(name) for name in ("name", "role", "types", "labels", "days")}
    try:
        limits = _limits(fields)
        row, key = db.unit(lambda: keys.create(fields["name"], fields["role"], **limits, by=visit.caller.name))
    except TowerError as error:
        return Again(KEYS, {"error": {"message": error.message, "field": error.field}, "fields": fields}, 422)
    return Again(KEYS, {"made": {"id": row["id"], "name": row["name"], "key": key}}, 201, "make key", f"{row['id']} {row['name']}")


def _limits(fields: dict[str, str]) -> dict[str, Any]:
    """Return what a key is limited to, and until when; raise InvalidKey."""
    if not (fields["name"] and len(fields["name"]) <= 200 and fields["name"].isprintable()):
        raise InvalidKey("A key has a name of 1 to 200 characters on one line: whose it is.", field="name")
    if fields["role"] not in ROLES:
        raise InvalidKey(f"There is no role {fields['role'][:80]!r}; known: {', '.join(ROLES)}.", field="role")
    labels = dict[str, str]()
    for label in filter(None, (part.strip() for part in fields["labels"].split(","))):
        name, colon, value = label.partition(":")
        if not (name and colon):
            raise InvalidKey(f"The label {label[:80]!r} has no colon; write name:value.", field="labels")
        labels[name] = value
    days = number("days", fields["days"]) if fields["days"] else None
    if days is not None and not 0 < days <= 36_500:
        raise InvalidKey("A key lasts for more than 0 and at most 36500 days; leave it empty for one without an end.", field="days")
    expires_at = None if days is None else db.read(db.clock) + days * 86_400
    return {"types": [name.strip() for name in fields["types"].split(",") if name.strip()], "labels": labels, "expires_at": expires_at}


def revoke_key(visit: Visit, sent: Fields) -> Done:
    """Let a key open nothing any more."""
    row = db.unit(lambda: keys.revoke(visit.values["key_id"]))
    return Done("/ui/keys", "revoke key", f"{row['id']} {row['name']}")


def save_view(visit: Visit, sent: Fields) -> Done:
    """Save or remove a filter under a name."""
    name, filters = sent.one("name"), sent.one("filters")
    if sent.one("do") == "remove":
        db.unit(lambda: views.remove(visit.caller, name))
        return Done("/ui/tasks")
    db.unit(lambda: views.save(visit.caller, name, filters))
    return Done(f"/ui/tasks?{filters}" if filters else "/ui/tasks")
