"""A client of a running tower: one method per question, documents as the API answers them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from tower import jsontext
from tower.errors import TowerError
from tower.settings import mask_url

Document = dict[str, Any]

_TIMEOUT = httpx2.Timeout(30, connect=5)
#: To change very many tasks takes a while.
_MANY = httpx2.Timeout(600, connect=5)
#: A stream says something every 15 s; after this long without a word it is dead.
_SILENCE = httpx2.Timeout(40, connect=5)
_PAGE = 500
_RESUME_TRIES = 60
_RESUME_PAUSE_S = 1.0


class Refused(TowerError):
    """The tower answered with an error; code and message are its own."""

    def __init__(self, message: str, *, code: str, status: int) -> None:
        super().__init__(message, code=code)
        self.status = status


class Unreachable(TowerError):
    """Nothing that speaks HTTP answers at the URL."""

    def __init__(self, url: str) -> None:
        super().__init__(f"No tower answers at {mask_url(url)}; start one with `tower up`.", code="unreachable")


class Client:
    """Talks to the tower at a URL; every method raises Refused or Unreachable."""

    def __init__(self, url: str) -> None:
        self._url = url
        # Proxies of the environment are for the world outside; a tower is spoken to directly.
        self._http = httpx2.Client(base_url=url, timeout=_TIMEOUT, trust_env=False)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def enqueue(self, spec: Document) -> tuple[str, bool]:
        """Enqueue a task; return its id, and False if an earlier request with its idempotency key made it. Raises BadJson as well."""
        body = jsontext.dumps(spec).encode()
        answer = self._ask("POST", "/tasks/enqueue", content=body, headers={"content-type": "application/json"})
        return str(self._read(answer, "task_id")["task_id"]), answer.status_code == 202

    def task(self, task_id: str) -> Document:
        """Return everything known about a task."""
        return self._read(self._ask("GET", f"/tasks/{task_id}"), "id")

    def tasks(self, limit: int, **filters: Any) -> Document:
        """Return up to `limit` tasks, newest first, and the cursor of those that follow."""
        found: list[Document] = []
        cursor = None
        while True:
            asked = {**filters, "limit": min(limit - len(found), _PAGE), "cursor": cursor}
            page = self._read(self._ask("GET", "/tasks", params={name: value for name, value in asked.items() if value}), "tasks")
            found, cursor = found + page["tasks"], page["next_cursor"]
            if len(found) >= limit or not cursor:
                return {"tasks": found, "next_cursor": cursor}

    def cancel(self, task_id: str, by: str | None = None) -> Document:
        """Cancel a task; `status` says whether it is cancelled or still being stopped."""
        return self._read(self._ask("POST", f"/tasks/{task_id}/cancel", params={"by": by} if by else None), "status")

    def retry(self, task_id: str, by: str | None = None) -> str:
        """Enqueue a final task again; return the id of the new task."""
        answer = self._ask("POST", f"/tasks/{task_id}/retry", params={"by": by} if by else None)
        return str(self._read(answer, "task_id")["task_id"])

    def cancel_all(self, chosen: Document, *, dry_run: bool = False, by: str | None = None) -> Document:
        """Cancel every task that fits a filter; return how many matched and changed, and their ids."""
        return self._change("cancel", chosen, dry_run, by)

    def retry_all(self, chosen: Document, *, dry_run: bool = False, by: str | None = None) -> Document:
        """Enqueue again what did not succeed, fits a filter and was not retried yet; likewise."""
        return self._change("retry", chosen, dry_run, by)

    def _change(self, what: str, chosen: Document, dry_run: bool, by: str | None) -> Document:
        body = {"filter": {name: value for name, value in chosen.items() if value}, "dry_run": dry_run, "by": by}
        return self._read(self._ask("POST", f"/tasks/{what}", json=body, timeout=_MANY), "matched", "changed", "task_ids")

    def why(self, task_id: str) -> Document:
        """Return why a task waits and when it will start."""
        return self._read(self._ask("GET", f"/tasks/{task_id}/why"), "summary", "chain")

    def rules(self) -> Document:
        """Return the limits, rates and pauses in force."""
        return self._read(self._ask("GET", "/rules"), "rules")

    def set_limit(self, kind: str, name: str, limit: Document) -> Document:
        """Limit the tower, or a queue, type, key or rate by name; return the rule."""
        body = jsontext.dumps(limit).encode()
        answer = self._ask("PUT", _rule_path(kind, name), content=body, headers={"content-type": "application/json"})
        return self._read(answer, "kind")

    def lift_limit(self, kind: str, name: str) -> Document:
        """Take a limit off; return the rule that is left."""
        return self._read(self._ask("DELETE", _rule_path(kind, name)), "kind")

    def pause(self, kind: str, name: str, by: str | None = None, reason: str | None = None) -> Document:
        """Start nothing of it; return the rule."""
        told = {key: value for key, value in (("by", by), ("reason", reason)) if value}
        return self._read(self._ask("POST", _pause_path(kind, name, "pause"), params=told), "kind")

    def resume(self, kind: str, name: str, by: str | None = None) -> Document:
        """Start tasks of it again; return the rule that is left."""
        return self._read(self._ask("POST", _pause_path(kind, name, "resume"), params={"by": by} if by else None), "kind")

    def log(self, task_id: str) -> Iterator[str]:
        """Yield the lines of a task's log as it is now."""
        with self._reaching(), self._http.stream("GET", f"/tasks/{task_id}/log") as answer:
            self._check(answer)
            yield from answer.iter_lines()

    def follow(self, task_id: str) -> Iterator[str]:
        """Yield the lines of a task's log until the task's end, going on where a dropped connection broke off."""
        seen, tries = "", 0
        while True:
            try:
                for event in self._stream(task_id, seen):
                    tries, seen = 1, event.id or seen
                    if event.event == "end":
                        return
                    yield from event.data.split("\n")
            except (Refused, Unreachable) as error:
                gone = isinstance(error, Refused) and error.status != 503
                if gone or not 0 < tries < _RESUME_TRIES:
                    raise
            tries += 1
            time.sleep(_RESUME_PAUSE_S)

    def _stream(self, task_id: str, seen: str) -> Iterator[httpx2.ServerSentEvent]:
        headers = {"last-event-id": seen} if seen else {}
        address, params = f"/tasks/{task_id}/log", {"follow": "true"}
        with (
            self._reaching(),
            self._http.sse(address, params=params, headers=headers, timeout=_SILENCE, max_event_size=None) as events,
        ):
            self._check(events.response)
            yield from events

    def _ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        with self._reaching():
            answer = self._http.request(method, path, **more)
        self._check(answer)
        return answer

    def _check(self, answer: httpx2.Response) -> None:
        """Raise Refused, with the reason that the problem document gives, unless the answer is a success."""
        if not answer.is_success:
            answer.read()
            problem = self._read(answer, "detail", "code")
            raise Refused(str(problem["detail"]), code=str(problem["code"]), status=answer.status_code)

    def _read(self, answer: httpx2.Response, *needed: str) -> Document:
        """Return the answer's document, if it is one that a tower could have sent."""
        try:
            found = json.loads(answer.content)
        except ValueError:
            found = None
        if isinstance(found, dict) and found.keys() >= set(needed):
            return found
        message = f"{mask_url(self._url)} answered {answer.status_code}, but not as a tower does; check the URL."
        raise Refused(message, code="not_a_tower", status=answer.status_code)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL, httpx2.DecodingError, UnicodeError) as error:  # the last: no such host name
            raise Unreachable(self._url) from error


def _rule_path(kind: str, name: str) -> str:
    return "/rules/tower" if kind == "tower" else f"/rules/{kind}/{quote(name)}"


def _pause_path(kind: str, name: str, act: str) -> str:
    return f"/{act}" if kind == "tower" else f"/{kind}s/{quote(name)}/{act}"
