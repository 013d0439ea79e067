"""Every error as a problem document (RFC 9457) with a machine-readable code."""

import difflib
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import Scope

from tower.errors import Conflict, InvalidKey, InvalidRule, InvalidTask, NotFound, Refused, TooLarge, TowerError, Unavailable
from tower.jsontext import BadJson
from tower.spec import BulkRequest, TaskFilter, TaskSpec

MEDIA_TYPE = "application/problem+json"

_STATUS: dict[type[TowerError], int] = {
    InvalidTask: 422,
    InvalidRule: 422,
    InvalidKey: 422,
    Refused: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Unavailable: 503,
}
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 416: "range_not_satisfiable"}

#: RFC 9110's names, where older Pythons have older ones.
_TITLES = {413: "Content Too Large", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}

#: What each status means here, for the OpenAPI document.
_MEANING = {
    400: "The body is not JSON the tower accepts.",
    401: "No key was shown, or one that opens nothing; `detail` says which.",
    403: "The key may not do this, or a page of another origin asked for a change.",
    404: "There is no such thing.",
    409: "It exists, but not in a state that allows this.",
    413: "The body is over the limit.",
    415: "The body is not declared as application/json.",
    416: "The file has no such bytes.",
    421: "The Host header names somebody else.",
    429: "Too many wrong keys came from this address; try again after `Retry-After` seconds.",
    422: "A field has a value that cannot be used; `detail` names it and the cure.",
    503: "Not now; try again after `Retry-After` seconds.",
}

#: What a value that fits no pattern is not, in words: a person cannot read the pattern.
_NO_MATCH = {
    "task_id": "is not a task id; GET /tasks lists them.",
    "correlation_id": "is not a task id; GET /tasks lists them.",
    "cursor": "is not a cursor; give the `next_cursor` of the page before, or none for the first.",
}
_NO_OBJECT = ("dict_type", "model_type", "model_attributes_type")

#: Where a body is a BulkRequest.
_BULK = ("/tasks/cancel", "/tasks/retry")

#: Errors told of one request; whoever made more has the same cure for the rest.
_MOST_ERRORS = 20

TOO_LARGE = "The body is over the limit (TOWER_MAX_BODY_MB); send less, or a reference to it."

_log = logging.getLogger(__name__)


class FieldError(BaseModel):
    """What is wrong with one field."""

    field: str = Field(examples=["priority"])
    message: str = Field(examples=["Input should be a valid integer, got '7'."])


class Problem(BaseModel):
    """An error: what, why, and what to do about it."""

    model_config = ConfigDict(extra="allow")

    type: str = Field("about:blank", examples=["about:blank"])
    title: str = Field(examples=["Unprocessable Content"])
    status: int = Field(examples=[422])
    code: str = Field(examples=["unknown_type"])
    detail: str = Field(examples=["No handler for type 'ehco'. Did you mean 'echo'? Known: command, echo, http, sleep."])
    field: str | None = Field(None, examples=["type"])
    errors: list[FieldError] | None = None


def problems(*statuses: int, is_public: bool = False) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI answers of a route that can fail with these statuses, and with those that every route has."""
    schema = {"$ref": "#/components/schemas/Problem"}
    known = dict.fromkeys((*statuses, 421) if is_public else (*statuses, 401, 403, 421, 429))
    return {status: {"description": _MEANING[status], "content": {MEDIA_TYPE: {"schema": schema}}} for status in known}


def problem(status: int, code: str, detail: str, /, *, headers: dict[str, str] | None = None, **more: Any) -> Response:
    """Return an error as a response."""
    title = _TITLES.get(status) or HTTPStatus(status).phrase
    told = {"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail}
    told |= {name: value for name, value in more.items() if value is not None and name not in told}
    return JSONResponse(told, status, headers=headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every error of the app with a problem document."""
    app.add_exception_handler(TowerError, _tower_error)
    app.add_exception_handler(BadJson, _bad_json)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _tower_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TowerError)  # noqa: S101  # registered for it
    return answer_to(error)


def answer_to(error: TowerError) -> Response:
    """Return an error of the tower as a response."""
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, Unavailable) else None
    return problem(status_of(error), error.code, error.message, headers=headers, field=error.field, **error.extra)


def status_of(error: TowerError) -> int:
    """Return the HTTP status that an error of the tower is answered with."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


async def _bad_json(request: Request, error: Exception) -> Response:
    return problem(400, "invalid_json", str(error))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    has = "A task has", list(TaskSpec.model_fields)
    if request.url.path in _BULK:
        has = "A change of many tasks has", list(BulkRequest.model_fields)
    told = [_field_error(item, *has) for item in error.errors()[:_MOST_ERRORS]]
    detail = " ".join(f"{item['field']}: {item['message']}" for item in told)
    return problem(422, "invalid_field", detail if len(detail) <= 2000 else detail[:1999] + "…", field=told[0]["field"], errors=told)


def _field_error(item: Any, has: str, fields: list[str]) -> dict[str, str]:
    source, *where = (str(part)[:100] for part in item["loc"])
    return {"field": _printable(".".join(where) or source), "message": _printable(_say(item, where, has, fields))}


def _say(item: Any, where: list[str], has: str, fields: list[str]) -> str:
    if item["type"] == "extra_forbidden":
        if where[0] == "filter":
            has, fields = "A filter has", list(TaskFilter.model_fields)
        near = difflib.get_close_matches(where[-1], fields, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        return f"There is no such field.{guess} {has}: {', '.join(fields)}."
    given = item.get("input")
    if item["type"] == "string_pattern_mismatch" and where[-1] in _NO_MATCH:
        return f"{_short(given)} {_NO_MATCH[where[-1]]}"
    shown = "" if item["type"] == "missing" or isinstance(given, dict | list) else f", got {_short(given)}"
    said = "Input should be an object, as in {...}" if item["type"] in _NO_OBJECT else str(item["msg"]).removeprefix("Value error, ")
    return f"{said}{shown}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    code = _CODES.get(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"))
    detail = str(error.detail)
    if error.status_code == 404:
        return answer_to(nothing_at(request.scope["path"]))
    if error.status_code == 405:
        detail = f"{request.method} is not possible here; the Allow header says what is."
    if error.status_code == 413:
        detail = TOO_LARGE
    return problem(error.status_code, code, detail, headers=dict(error.headers or {}))


def nothing_at(path: str) -> NotFound:
    """Return the error for an address where nothing is."""
    return NotFound(f"There is nothing at {_printable(path[:200])}; GET /openapi.json lists what there is.", code=_CODES[404])


def unexpected(scope: Scope, error: Exception) -> Response:
    """Return the answer to a request that failed in a way nobody foresaw, and log why."""
    _log.error("a request failed unexpectedly: %s %r", scope["method"], scope["path"][:200], exc_info=error)
    return problem(500, "internal_error", "Something went wrong in the tower; its log says what.")
