"""A client of a running tower: one method per question, documents as the API answers them."""

import json
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from tower import jsontext
from tower.errors import TowerError
from tower.settings import mask_url
from tower.terms import FINAL

Document = dict[str, Any]

_TIMEOUT = httpx2.Timeout(30, connect=5)
#: To change very many tasks takes a while.
_MANY = httpx2.Timeout(600, connect=5)
#: A stream says something every 15 s; after this long without a word it is dead.
_SILENCE = httpx2.Timeout(40, connect=5)
_PAGE = 500
_RESUME_TRIES = 60
_RESUME_PAUSE_S = 1.0
#: How long a request is repeated that the tower could not take, and the pause after the first time, which doubles.
_PATIENCE_S, _PAUSE_S, _LONGEST_PAUSE_S = 30.0, 0.25, 5.0
#: What a tower, or a proxy before it, answers that has not done anything.
_NOT_NOW = (429, 502, 503, 504)
#: Codes of answers after which nobody knows whether a change was made.
_MAY_HAVE_BEEN_DONE = ("stopping", "not_a_tower")


class Refused(TowerError):
    """The tower answered with an error; code and message are its own."""

    def __init__(self, message: str, *, code: str, status: int, retry_after_s: float | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status
        #: How long the tower asks to wait, in seconds.
        self.retry_after_s = retry_after_s


class Unreachable(TowerError):
    """Nothing that speaks HTTP answers at the URL."""

    def __init__(self, url: str) -> None:
        super().__init__(f"No tower answers at {mask_url(url)}; start one with `tower up`.", code="unreachable")


class Client:
    """Talks to the tower at a URL; every method raises Refused or Unreachable.

        with Client("http://127.0.0.1:8000", key="twr_…") as tower:
            task_id, _ = tower.enqueue({"type": "echo", "payload": {"hello": "tower"}})
            for line in tower.follow(task_id):
                print(line)
            print(tower.wait(task_id)["result"])

    While the tower restarts, is busy or asks to wait, requests are repeated for `patience_s` seconds, if that can do nothing twice; one
    that nobody has ever answered is not. A task is enqueued under an idempotency key of its own, so it is made once whatever happens.
    """

    def __init__(self, url: str, *, key: str | None = None, patience_s: float = _PATIENCE_S) -> None:
        self._url = url
        self._patience_s = patience_s
        self._has_answered = False
        # Proxies of the environment are for the world outside; a tower is spoken to directly.
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(base_url=url, timeout=_TIMEOUT, trust_env=False, headers=headers)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def enqueue(self, spec: Document) -> tuple[str, bool]:
        """Enqueue a task; return its id, and False if an earlier request with its idempotency key made it. Raises BadJson as well."""
        is_named = spec.get("idempotency_key") is not None
        body = jsontext.dumps(spec if is_named else {**spec, "idempotency_key": f"client-{uuid.uuid4()}"}).encode()
        answer = self._ask("POST", "/tasks/enqueue", content=body, headers={"content-type": "application/json"})
        return str(self._read(answer, "task_id")["task_id"]), answer.status_code == 202 or not is_named

    def wait(self, task_id: str, *, timeout_s: float | None = None) -> Document:
        """Return the task when it has ended; raise TimeoutError after `timeout_s`, which leaves it as it is."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause = 0.1
        while (found := self.task(task_id))["status"] not in FINAL:
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"Task {task_id} is {found['status']} after {timeout_s:g} s; it goes on.")
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, 2.0)
        return found

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
        answer = self._ask("POST", f"/tasks/{task_id}/retry", params={"by": by} if by else None, repeats=False)
        return str(self._read(answer, "task_id")["task_id"])

    def cancel_all(self, chosen: Document, *, dry_run: bool = False, by: str | None = None) -> Document:
        """Cancel every task that fits a filter; return how many matched and changed, and their ids."""
        return self._change("cancel", chosen, dry_run, by)

    def retry_all(self, chosen: Document, *, dry_run: bool = False, by: str | None = None) -> Document:
        """Enqueue again what did not succeed, fits a filter and was not retried yet; likewise."""
        return self._change("retry", chosen, dry_run, by)

    def _change(self, what: str, chosen: Document, dry_run: bool, by: str | None) -> Document:
        body = {"filter": {name: value for name, value in chosen.items() if value}, "dry_run": dry_run, "by": by}
        answer = self._ask("POST", f"/tasks/{what}", json=body, timeout=_MANY, repeats=False)  # else it could not say how many
        return self._read(answer, "matched", "changed", "task_ids")

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

    def me(self) -> Document:
        """Return who the tower takes us for."""
        return self._read(self._ask("GET", "/me"), "name", "role")

    def keys(self) -> list[Document]:
        """Return all keys, newest first."""
        return list(self._read(self._ask("GET", "/access/keys"), "keys")["keys"])

    def create_key(self, **asked: Any) -> Document:
        """Make a key; `key` of what is returned is told this once."""
        return self._read(self._ask("POST", "/access/keys", json=asked, repeats=False), "id", "key")

    def revoke_key(self, key_id: str) -> Document:
        """Let a key open nothing any more."""
        return self._read(self._ask("DELETE", f"/access/keys/{quote(key_id)}"), "id")

    def audit(self, limit: int) -> list[Document]:
        """Return up to 500 of the last changes, newest first."""
        return list(self._read(self._ask("GET", "/access/audit", params={"limit": limit}), "entries")["entries"])

    def handlers(self) -> list[Document]:
        """Return the task types."""
        return list(self._read(self._ask("GET", "/handlers"), "handlers")["handlers"])

    def workers(self) -> list[Document]:
        """Return the live workers."""
        return list(self._read(self._ask("GET", "/workers"), "workers")["workers"])

    def queues(self) -> list[Document]:
        """Return the queues and how many tasks are where."""
        return list(self._read(self._ask("GET", "/queues"), "queues")["queues"])

    def readiness(self) -> Document:
        """Return what accepts and runs tasks right now; a tower that cannot says so, and that is no error here."""
        with self._reaching():
            return self._read(self._http.get("/health/ready"), "status", "problems")

    def _ask(self, method: str, path: str, *, repeats: bool = True, **more: Any) -> httpx2.Response:
        """Ask, and again while the tower is away or asks for that; once only if that could do something twice."""
        deadline, pause = time.monotonic() + self._patience_s, _PAUSE_S
        while True:
            try:
                with self._reaching():
                    answer = self._http.request(method, path, **more)
                self._check(answer)
            except (Refused, Unreachable) as error:
                wait = self._wait_s(error, pause, repeats)
                if wait is None or time.monotonic() + wait > deadline:
                    raise
                time.sleep(wait)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
            else:
                self._has_answered = True
                return answer

    def _wait_s(self, error: TowerError, pause: float, repeats: bool) -> float | None:
        """Return for how long to wait before asking again; None if that is of no use."""
        if isinstance(error, Refused):
            self._has_answered = True
            if error.status not in _NOT_NOW or (not repeats and error.code in _MAY_HAVE_BEEN_DONE):
                return None
            return error.retry_after_s if error.retry_after_s is not None else pause
        return pause if repeats and self._has_answered else None

    def _check(self, answer: httpx2.Response) -> None:
        """Raise Refused, with the reason that the problem document gives, unless the answer is a success."""
        if not answer.is_success:
            answer.read()
            problem = self._read(answer, "detail", "code")
            after = answer.headers.get("retry-after", "")
            wait = float(after) if after.isascii() and after.isdigit() else None
            raise Refused(str(problem["detail"]), code=str(problem["code"]), status=answer.status_code, retry_after_s=wait)

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
