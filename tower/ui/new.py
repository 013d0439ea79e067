"""The form that makes a task: from its type's schema, or from a task that is done again."""

import json
from typing import Any

from pydantic import ValidationError

from tower import db, queries
from tower.api.tasks import check_covered
from tower.errors import InvalidTask
from tower.spec import TaskSpec
from tower.ui import schema
from tower.ui.forms import Again, Done, Fields
from tower.ui.page import Page, Visit
from tower.ui.task import asked, curl, curl_without_body

_TEXTS = ("title", "concurrency_key", "idempotency_key")
_NUMBERS = ("priority", "timeout_s", "silence_s", "max_attempts", "concurrency_limit")
_TIMES = ("not_before", "expires_at")
#: A rate is one field of a task and three of the form.
_RATE = {"rate_key": "key", "rate_limit": "limit", "rate_per_s": "per_s"}


def new(visit: Visit) -> dict[str, Any]:
    """Return the form: empty, filled with an older task, or as it was sent and refused."""
    said: dict[str, Any] = {"error": None, "body": None, "sent": None, **visit.said}
    types = [
        kind for kind in sorted(visit.registry, key=lambda kind: kind.name) if not visit.caller.types or kind.name in visit.caller.types
    ]
    body = said["body"]
    origin = visit.query.get("from")
    if body is None and origin:
        row = db.read(lambda: queries.task(origin))
        if not visit.caller.covers(row["type"], json.loads(row["labels"])):
            raise queries.not_found(origin)
        body = asked(row)
        body |= {name: body["rate"][part] for name, part in _RATE.items() if "rate" in body}
    name = (body or {}).get("type") or visit.query.get("type") or (types[0].name if types else "")
    kind = visit.registry.get(name)
    payload_schema = kind.payload.model_json_schema()
    payload = (body or {}).get("payload")
    made = schema.fields(payload_schema, payload)
    sent: Fields | None = said["sent"]
    if sent:  # also what was no JSON, as it was typed
        made = [schema.Field(**{**vars(field), "value": sent.text(field.name)}) for field in made]
    labels = (body or {}).get("labels") or dict(visit.caller.labels)
    more = {name: sent.one(name) if sent else (body or {}).get(name) for name in (*_TEXTS, *_NUMBERS, *_TIMES, *_RATE)}
    example: dict[str, Any] = {"type": name, "payload": payload or next(iter(payload_schema.get("examples", [])), {})}
    return {
        "title": "New task",
        "kind": kind,
        "types": types,
        "fields": made,
        "labels": sent.text("labels") if sent else "\n".join(f"{name}:{value}" for name, value in labels.items()),
        "more": {name: "" if value is None else value for name, value in more.items()},
        "is_open": any(value not in (None, "") for value in more.values()) or bool(labels),
        "error": said["error"],
        "origin": origin or (sent.one("origin") if sent else ""),
        "curl": curl(visit, {name: value for name, value in body.items() if name not in _RATE} if body else example),
        "curl_begin": curl_without_body(visit),
    }


NEW = Page("new.html", new)


def make(visit: Visit, sent: Fields) -> Done | Again:
    """Enqueue what the form says, or show it again with what is wrong."""
    body: dict[str, Any] | None = None
    try:
        kind = visit.registry.get(sent.one("type"))
        body = {"type": kind.name, "payload": schema.read(kind.payload.model_json_schema(), sent), **_more(sent)}
        spec = _spec(body)
        check_covered(visit.caller, [spec])
        accepted = visit.orchestrator.accept(spec, by=visit.caller.actor)
    except InvalidTask as error:
        known = body or {"type": sent.one("type")}
        return Again(NEW, {"error": {"message": error.message, "field": error.field}, "body": known, "sent": sent}, 422)
    return Done(f"/ui/tasks/{accepted.id}")


def _more(sent: Fields) -> dict[str, Any]:
    said: dict[str, Any] = {name: sent.one(name) for name in _TEXTS if sent.one(name)}
    for name in _NUMBERS:
        if text := sent.one(name):
            said[name] = schema.number(name, text)
    for name in _TIMES:
        if text := sent.one(name):
            # A browser's field has neither seconds nor a zone: the page says that it is UTC.
            said[name] = (
                text if not text[0].isdigit() or text[-1] in "Zz" or "+" in text else f"{text}:00Z" if text.count(":") == 1 else f"{text}Z"
            )
    rate = {part: sent.one(name) for name, part in _RATE.items() if sent.one(name)}
    if rate:
        numbers = {part: schema.number(f"rate_{part}", rate[part]) for part in ("limit", "per_s") if part in rate}
        said["rate"] = {**rate, **numbers}
    labels = dict[str, str]()
    for line in sent.text("labels").split("\n"):
        name, colon, value = line.strip().partition(":")
        if name and not colon:
            raise InvalidTask(
                f"The label {line.strip()[:80]!r} has no colon; write name:value, one on a line.", code="invalid_field", field="labels"
            )
        if name:
            labels[name] = value.strip()
    return {**said, **({"labels": labels} if labels else {})}


def _spec(body: dict[str, Any]) -> TaskSpec:
    try:
        return TaskSpec.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        shown = str(first.get("input"))[:80]
        said = f"{where}: {first['msg'].removeprefix('Value error, ')}, got {shown!r}."
        raise InvalidTask(said, code="invalid_field", field=where) from None
