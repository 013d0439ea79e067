"""JSON as the tower accepts and stores it: UTF-8, unique keys, finite numbers, text any database can hold."""

import json
import math
from contextlib import suppress
from typing import Any, NoReturn

import orjson

_MAX_DEPTH = 100
_MAX_INT = 2**63 - 1
#: Where Python writes a float without an exponent, as orjson does.
_LEAST, _MOST = 1e-4, 1e16
_COMMON = frozenset({str, int, bool, type(None)})


class BadJson(ValueError):
    """The text is not JSON the tower accepts; the message says why and where."""


def loads(data: bytes) -> Any:
    """Parse a request body; raise BadJson for anything another program could read differently."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson(f"The body is not UTF-8 (byte {error.start}); send UTF-8 JSON.") from None
    if text.startswith("\ufeff"):
        raise BadJson("The body starts with a byte order mark; send UTF-8 JSON without one.")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_small)
    except json.JSONDecodeError as error:
        raise BadJson(f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise BadJson(_too_deep()) from None
    check(value)
    return value


def dumps(value: Any) -> str:
    """Write a value as compact JSON; raise BadJson for what JSON or a database cannot hold."""
    if _is_common(value):
        with suppress(TypeError):  # half a surrogate pair, or a number of more than 64 bits
            text = orjson.dumps(value).decode()
            if "\\u0000" not in text:
                return text
    try:
        check(value)
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, BadJson) else BadJson(f"Not JSON: {error}") from None


def _is_common(value: Any, depth: int = 0) -> bool:
    """Whether orjson writes a value as `json` does, in a tenth of the time: it takes more than JSON has, and makes null of NaN."""
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) is not str:
                return False
        value = value.values()
    elif kind is float:
        return _LEAST <= abs(value) < _MOST or not value
    elif kind is not list and kind is not tuple:
        return kind in _COMMON
    if depth == _MAX_DEPTH:
        return False
    for item in value:  # noqa: SIM110  # `all` would take twice as long
        if type(item) not in _COMMON and not _is_common(item, depth + 1):
            return False
    return True


def canonical(value: Any) -> str:
    """Write a value so that equal values give equal text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)


def check(value: Any, depth: int = 0) -> None:
    """Raise BadJson if a parsed value holds text, numbers or depth that some part of the tower cannot keep."""
    if depth > _MAX_DEPTH:
        raise BadJson(_too_deep())
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(key, str):
                _check_text(key)
            check(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check(item, depth + 1)


def _check_text(text: str) -> None:
    if "\x00" in text:
        raise BadJson(f"The text {text[:40]!r} holds a NUL character; remove it.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadJson(f"The text {text[:40]!r} holds half a surrogate pair; send whole characters.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise BadJson(f"The key {key[:40]!r} stands twice in one object; keep one.")
        made[key] = value
    return made


def _no_constant(name: str) -> NoReturn:
    raise BadJson(f"{name} is not JSON; use null or a finite number.")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise BadJson(f"The number {text[:40]} is too large for a double.")
    return value


def _small(text: str) -> int:
    if len(text) > 20 or not -_MAX_INT - 1 <= int(text) <= _MAX_INT:
        raise BadJson(f"The number {text[:40]} does not fit 64 bits; send it as a string.")
    return int(text)


def _too_deep() -> str:
    return f"The value is nested deeper than {_MAX_DEPTH} levels; flatten it."
