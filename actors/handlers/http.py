"""http: asks a server."""

import asyncio
import re
from typing import Annotated, Any, Literal

import httpx2
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from tower import __version__
from tower.handler import SECRET, SECRET_NAME, Fail, Stopped, TaskContext, handler

_MAX_REDIRECTS = 5
_NAMED = re.compile(f"{SECRET}({SECRET_NAME.pattern})")
_TICK_S = 0.1
#: What may be told to another host than the one that was asked.
_HARMLESS = ("user-agent", "accept", "accept-encoding", "accept-language", "content-type")


class HttpPayload(BaseModel):
    """One request and what counts as a good answer."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"url": "http://127.0.0.1:8000/health", "expect_status": [200]}]}
    )

    url: str = Field(max_length=8192, description="http:// or https://.")
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] = Field("GET", description="The method.")
    headers: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}$")], str] = Field(
        default_factory=dict,
        max_length=100,
        description="More request headers; `secret://NAME` in one stands for a secret of the worker, which is hidden in all that is said.",
    )
    body: str | None = Field(None, description="The request's body, as text.")
    expect_status: list[Annotated[int, Field(ge=100, le=599)]] = Field(
        default=[], description="Status codes that count as success; any 2xx if empty."
    )
    max_bytes: int = Field(1_000_000, ge=0, le=10_000_000, description="The largest answer that is read.")

    @field_validator("url")
    @classmethod
    def _is_web(cls, value: str) -> str:
        try:
            url = httpx2.URL(value)
        except httpx2.InvalidURL as error:
            raise ValueError(f"is not a URL: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("should start with http:// or https:// and name a host")
        return value

    @field_validator("headers")
    @classmethod
    def _one_line(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if any((ord(character) < 32 and character != "\t") or ord(character) == 127 for character in text):
                raise ValueError(f"the value of {name} should be one line")
        return value


@handler("http", payload=HttpPayload, timeout_s=60)
def http(payload: HttpPayload, task: TaskContext) -> dict[str, Any]:
    """Send one HTTP request and check the answer's status; the whole exchange ends with timeout_s."""
    told = {name: _NAMED.sub(lambda found: task.secret(found[1]), value) for name, value in payload.headers.items()}
    try:
        answer = asyncio.run(_exchange(payload.model_copy(update={"headers": told}), task))
    except httpx2.HTTPError as error:
        raise Fail("http_error", f"{type(error).__name__}: {error}") from None
    task.log(f"{payload.method} {_place(payload.url)} answered {answer['status']}")
    good = answer["status"] in payload.expect_status if payload.expect_status else 200 <= answer["status"] < 300
    if not good:
        wanted = ", ".join(map(str, payload.expect_status)) or "any 2xx"
        raise Fail("unexpected_status", f"{_place(payload.url)} answered {answer['status']}, expected {wanted}.", **answer)
    return answer


async def _exchange(payload: HttpPayload, task: TaskContext) -> dict[str, Any]:
    """Run the request beside a watch that ends it, wherever it is, when the attempt must stop."""
    request = asyncio.ensure_future(_request(payload))
    while True:
        done, _ = await asyncio.wait([request], timeout=_TICK_S)
        if done:
            return request.result()
        if task.cancelled:
            request.cancel()
            await asyncio.wait([request])
            raise Stopped("the attempt must end")


async def _request(payload: HttpPayload) -> dict[str, Any]:
    url, method, body = httpx2.URL(payload.url), payload.method, payload.body
    # Identity: a small compressed answer could unpack to more than the memory.
    headers = {"user-agent": f"devops-control-tower/{__version__}", "accept-encoding": "identity", **payload.headers}
    async with httpx2.AsyncClient(timeout=None) as client:  # the attempt's own deadline holds
        for _ in range(_MAX_REDIRECTS + 1):
            async with client.stream(method, url, headers=headers, content=body) as response:
                if response.next_request is None:
                    return await _read(response, payload.max_bytes)
                target = response.next_request
            if target.url.scheme != url.scheme:
                raise Fail("redirect_refused", f"{_place(payload.url)} redirects to {target.url.scheme}://; call the final URL directly.")
            if target.url.host != url.host or target.url.port != url.port:
                headers = {name: value for name, value in headers.items() if name.lower() in _HARMLESS}
            method, url = target.method, target.url  # type: ignore[assignment]  # httpx2 turns a POST into a GET where the RFC says so
            body = None if method == "GET" else body
    raise Fail("redirect_refused", f"{_place(payload.url)} redirects more than {_MAX_REDIRECTS} times.")


async def _read(response: httpx2.Response, max_bytes: int) -> dict[str, Any]:
    data = bytearray()
    async for piece in response.aiter_bytes():
        data += piece
        if len(data) > max_bytes:
            raise Fail("response_too_large", f"The answer is over max_bytes={max_bytes}.", status=response.status_code)
    return {
        "status": response.status_code,
        "headers": {name: value.replace("\x00", "") for name, value in response.headers.items() if name != "set-cookie"},
        "body": bytes(data).decode(response.encoding or "utf-8", "replace").replace("\x00", "\ufffd"),
    }


def _place(url: str) -> str:
    """Return a URL as it may be shown: without account and query."""
    shown = httpx2.URL(url)
    return f"{shown.scheme}://{shown.host}{f':{shown.port}' if shown.port else ''}{shown.path}"
