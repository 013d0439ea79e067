"""A form for a payload, from its JSON schema, and the payload that such a form means."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tower.errors import InvalidTask
from tower.jsontext import BadJson, loads
from tower.ui.forms import Fields
from tower.ui.words import pretty

#: What the names of a payload's fields begin with in a form, and the name of one that takes the whole payload.
PREFIX, WHOLE = "payload.", "payload"
#: Texts that may be longer than this get more than a line.
_LONG = 10_000


@dataclass(frozen=True)
class Field:
    """One field of a form. `kind`: text, long, number, switch, choice, lines, numbers, or json."""

    name: str
    kind: str
    description: str
    is_required: bool
    value: str
    choices: tuple[str, ...] = ()
    is_whole: bool = False
    lowest: float | None = None
    highest: float | None = None

    @property
    def label(self) -> str:
        """What the field is called for people."""
        return self.name.removeprefix(PREFIX)

    @property
    def id(self) -> str:
        """What the page knows it by."""
        return f"field-{self.name.replace('.', '-')}"


def fields(schema: dict[str, Any], payload: dict[str, Any] | None) -> list[Field]:
    """Return the fields of a payload, filled with one, or with the schema's defaults."""
    made = list(_fields(schema, payload))
    if made:
        return made
    example = payload if payload is not None else next(iter(schema.get("examples", [])), {})
    return [Field(WHOLE, "json", schema.get("description", ""), True, pretty(example))]


def _fields(schema: dict[str, Any], payload: dict[str, Any] | None) -> Iterator[Field]:
    required = schema.get("required", [])
    for name, whole in schema.get("properties", {}).items():
        part = _resolved(whole, schema)
        kind = _kind(part)
        value = payload.get(name) if payload is not None else whole.get("default")
        yield Field(
            PREFIX + name,
            kind,
            whole.get("description", part.get("description", "")),
            name in required,
            _text(kind, value),
            tuple(map(str, part.get("enum", ()))),
            part.get("type") == "integer",
            part.get("minimum"),
            part.get("maximum"),
        )


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return what a part means: what it refers to, and what it is if it is not null."""
    if "$ref" in part:
        return _resolved(schema.get("$defs", {}).get(part["$ref"].rsplit("/", 1)[-1], {}), schema)
    options = [option for option in part.get("anyOf", ()) if option.get("type") != "null"]
    return _resolved(options[0], schema) if len(options) == 1 else part


def _kind(part: dict[str, Any]) -> str:
    if "enum" in part and all(isinstance(choice, str) for choice in part["enum"]):
        return "choice"
    kind, items = part.get("type"), part.get("items", {}).get("type")
    if kind == "string":
        return "long" if part.get("maxLength", _LONG + 1) > _LONG else "text"
    if kind == "array" and items in ("string", "integer", "number"):
        return "lines" if items == "string" else "numbers"
    return {"integer": "number", "number": "number", "boolean": "switch"}.get(str(kind), "json")


def _text(kind: str, value: Any) -> str:
    """Return a value as it stands in a field of that kind."""
    if value is None or (kind in ("lines", "numbers", "json") and value in ([], {})):
        return ""
    if kind == "lines" and isinstance(value, list):
        return "\n".join(map(str, value))
    if kind == "numbers" and isinstance(value, list):
        return ", ".join(map(str, value))
    if kind == "switch":
        return "on" if value else ""
    return value if isinstance(value, str) and kind != "json" else pretty(value)


def read(schema: dict[str, Any], sent: Fields) -> dict[str, Any]:
    """Return the payload that a form means: what is left empty is absent. Raises InvalidTask for text that is no JSON or number."""
    if WHOLE in sent:
        whole = _value("json", WHOLE, sent.text(WHOLE) or "{}")
        if not isinstance(whole, dict):
            raise InvalidTask('The payload is a JSON object, as in {"hello": "tower"}.', code="invalid_field", field=WHOLE)
        return whole
    payload = {}
    for field in fields(schema, None):
        text = sent.text(field.name)
        if field.kind == "switch":
            payload[field.label] = bool(text)
        elif text.strip() or (field.is_required and field.kind in ("text", "long")):
            payload[field.label] = _value(field.kind, field.name, text)
    return payload


def _value(kind: str, name: str, text: str) -> Any:
    if kind in ("text", "long", "choice"):
        return text
    if kind == "lines":
        return [line for line in text.split("\n") if line]
    try:
        if kind == "number":
            return _number(text)
        if kind == "numbers":
            return [_number(part) for part in text.replace(",", " ").split()]
        return loads(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadJson) and not str(error).startswith("The body"):  # it is JSON, but not as the tower takes it
            raise InvalidTask(f"{name}: {error}", code="invalid_field", field=name) from None
        wanted = "JSON" if kind == "json" else "a number" if kind == "number" else "numbers with commas between them"
        raise InvalidTask(f"{name}: {text.strip()[:80]!r} is not {wanted}.", code="invalid_field", field=name) from None


def number(name: str, text: str) -> Any:
    """Return the number in a field; raise InvalidTask if it holds none."""
    return _value("number", name, text)


def whole(name: str, text: str) -> int:
    """Return the whole number in a field; raise InvalidTask if it holds none."""
    found = number(name, text)
    if not isinstance(found, int):
        raise InvalidTask(f"{name}: {text.strip()[:80]!r} is not a whole number.", code="invalid_field", field=name)
    return found


def _number(text: str) -> int | float:
    found = loads(text.strip().removeprefix("+").encode())
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError
    return found
