"""The load: mixed tasks, each asked for until there is an answer, some of them cancelled."""

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

JOURNAL = Path(__file__).with_name("journal.py")
_CLIENTS = 4
#: Of every twenty tasks so many of each kind; the plain ones have neither key nor labels, as most tasks of most towers.
MIX = (
    *("echo", "plain") * 2,
    *("command",) * 5,
    *("fork", "setsid", "stubborn"),
    *("sleep", "failing", "retry", "flaky", "timeout", "cancel", "once", "key"),
)


def kind_of(number: int) -> str:
    """Return of which kind the task of this number is."""
    return MIX[number % len(MIX)]


def spec(run: str, number: int, journal: Path, seed: int) -> dict[str, Any]:
    """Return the task of this number: the same in every call, so that it can be asked for twice, unless it is a plain one."""
    choose = random.Random(f"{seed}/{number}")
    kind, seconds = kind_of(number), round(choose.uniform(0.1, 1.0), 2)
    run_it = [sys.executable, "-S", "-E", str(JOURNAL), str(journal)]
    asked: dict[str, Any] = {"type": "command", "payload": {"argv": [*run_it, str(seconds)]}}
    if kind in ("echo", "plain"):
        asked = {"type": "echo", "payload": {"number": number}}
    elif kind == "sleep":
        asked = {"type": "sleep", "payload": {"seconds": seconds * 2}}
    elif kind in ("retry", "flaky"):
        asked = {"type": f"chaos.{kind}", "payload": {"times": number % 3}}
    elif kind in ("fork", "setsid", "stubborn"):
        asked["payload"]["argv"] += [kind]
    elif kind == "failing":
        asked["payload"]["argv"] += ["exit=3"]
        asked |= {"max_attempts": 2}
    elif kind == "timeout":
        asked["payload"]["argv"] = [*run_it, "60", "setsid"]
        asked |= {"timeout_s": seconds + 0.5}
    elif kind == "cancel":
        asked["payload"]["argv"] = [*run_it, "60", "fork"]
        asked |= {"timeout_s": 8.0}
    elif kind == "once":
        asked |= {"max_attempts": 1}
    elif kind == "key":
        asked |= {"concurrency_key": f"key-{number // len(MIX) % 2}"}
    if kind == "plain":
        return asked
    return {**asked, "labels": {"kind": kind}, "idempotency_key": f"{run}-{number}", "priority": choose.randrange(0, 5)}


class Load:
    """Submits `count` tasks over `seconds` and remembers every answer."""

    def __init__(self, url: str, run: str, journal: Path, seed: int, count: int, seconds: float) -> None:
        self._url, self._run, self._journal, self._seed = url, run, journal, seed
        self._count, self._seconds = count, seconds
        self._numbers: Iterator[int] = iter(range(count))
        self._lock = threading.Lock()
        self.asked: set[int] = set()
        #: The ids that were answered, by number.
        self.accepted: dict[int, str] = {}
        #: How often each plain task was asked for: whoever has no key and gets no answer may have been heard all the same.
        self.posts = Counter[int]()
        #: Answers that told of another id than an earlier one for the same key, or that should not be.
        self.wrong: list[str] = []
        #: Tasks of which the tower said that they are cancelled.
        self.cancelled: set[str] = set()
        self.refused = self.unanswered = 0
        self.statuses: Counter[int] = Counter()
        self._deadline = float("inf")
        self._threads = [threading.Thread(target=self._submit, name=f"client-{n}", daemon=True) for n in range(_CLIENTS)]

    def start(self) -> None:
        """Begin."""
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def finish(self, seconds: float) -> None:
        """Ask for no more tasks; wait until each that was asked for has an answer, so long at most."""
        self._numbers = iter(())
        self._deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(seconds + 20)

    def _submit(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=8) as client:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                self.asked.add(number)
                time.sleep(max(0.0, self._began + number * self._seconds / self._count - time.monotonic()))
                body = spec(self._run, number, self._journal, self._seed)
                self._ask_for(client, number, body)
                if number % 10 == 0 and kind_of(number) != "plain":  # the same once more, as a client would that had no patience
                    self._ask_for(client, number, body)
                if kind_of(number) == "cancel" and number in self.accepted:
                    time.sleep(0.3 * (number % 3))
                    self._cancel(client, self.accepted[number])

    def _ask_for(self, client: httpx2.Client, number: int, body: dict[str, Any]) -> None:
        answer = self._insist(client, "/tasks/enqueue", body, number)
        if answer is None:
            return
        if answer.status_code not in (200, 202):
            self.wrong.append(f"task {number} was answered {answer.status_code}: {answer.text[:300]}")
            return
        with self._lock:
            task_id = answer.json()["task_id"]
            if self.accepted.setdefault(number, task_id) != task_id:
                self.wrong.append(f"task {number} is {self.accepted[number]} and {task_id}")

    def _cancel(self, client: httpx2.Client, task_id: str) -> None:
        answer = self._insist(client, f"/tasks/{task_id}/cancel", {})
        if answer is None or answer.status_code == 409:  # it has ended by itself
            return
        if answer.status_code not in (200, 202):
            self.wrong.append(f"the cancel of {task_id} was answered {answer.status_code}: {answer.text[:300]}")
        elif answer.json()["status"] == "cancelled":
            self.cancelled.add(task_id)

    def _insist(self, client: httpx2.Client, path: str, body: dict[str, Any], number: int | None = None) -> httpx2.Response | None:
        """Ask until there is an answer that is not 'not now', or the time is over."""
        while time.monotonic() < self._deadline:
            if number is not None and kind_of(number) == "plain":
                with self._lock:
                    self.posts[number] += 1
            try:
                answer = client.post(path, json=body)
            except httpx2.TransportError:
                with self._lock:
                    self.unanswered += 1
            else:
                with self._lock:
                    self.statuses[answer.status_code] += 1
                    self.refused += answer.status_code == 503
                if answer.status_code != 503:
                    return answer
            time.sleep(0.3)
        return None
