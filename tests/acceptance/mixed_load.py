"""Enqueues many mixed tasks at a running tower, waits for their end, and checks that nothing was lost, doubled or left untold.

    python -m tests.acceptance.mixed_load --url http://127.0.0.1:8000 --tasks 1000 --over 60

Kill and restart whatever you like meanwhile: a request that gets no answer is sent again with its idempotency key. Exits 1 if a promise
was broken.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2

FINAL = ("succeeded", "failed", "cancelled", "timed_out")
FILES = ("input.json", "log.txt", "output.json", "events.jsonl")
#: What may follow "started" before the next "started".
BACK_TO_QUEUE = ("released", "worker_lost", "retry_scheduled")

_CLIENTS, _BATCH, _PAGE = 8, 50, 500
_PROBLEMS_SHOWN = 20

#: The mix: of every twenty tasks, so many of each. Beside each kind the statuses it may end with.
_MIX = ("echo",) * 8 + ("command",) * 5 + ("exit_3",) * 2 + ("sleep",) * 3 + ("http",) * 2
EXPECTED = {
    "echo": ("succeeded",),
    "command": ("succeeded",),
    "exit_3": ("failed",),
    "sleep": ("succeeded",),
    "http": ("succeeded", "failed"),  # the server that it asks may be down at that moment
}


def spec(run: str, number: int, http_url: str) -> dict[str, Any]:
    """Return the task of this number: the same in every call, so that it can be asked for twice."""
    kind = _MIX[number % len(_MIX)]
    payload: dict[str, Any] = {
        "echo": {"number": number},
        "command": {"argv": ["sh", "-c", f"echo started; sleep 0.{number % 4}; echo {number}"]},
        "exit_3": {"argv": ["sh", "-c", "echo cannot go on >&2; exit 3"]},
        "sleep": {"seconds": 0.2 + number % 10 / 5},
        "http": {"url": http_url},
    }[kind]
    labels = {"run": run, "kind": kind, "number": str(number)}
    type_ = "command" if kind == "exit_3" else kind
    return {"type": type_, "payload": payload, "labels": labels, "idempotency_key": f"{run}-{number}", "title": f"{kind} {number}"}


@dataclass
class Api:
    """The tower, asked again and again until it answers or the time is over."""

    url: str
    deadline: float
    client: httpx2.Client = field(init=False)
    latencies: list[float] = field(default_factory=list)
    unanswered: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.client = httpx2.Client(base_url=self.url, timeout=15)

    def get(self, path: str, **query: Any) -> httpx2.Response:
        return self._ask(lambda: self.client.get(path, params=query))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        def send() -> httpx2.Response:
            began = time.monotonic()
            answer = self.client.post(path, json=body)
            self.latencies.append(time.monotonic() - began)
            return answer

        return dict(self._ask(send).json())

    def _ask(self, send: Callable[[], httpx2.Response]) -> httpx2.Response:
        pause = 0.1
        while True:
            try:
                answer = send()
                if answer.status_code < 500:
                    return answer.raise_for_status()
                told = str(answer.status_code)
            except httpx2.TransportError as error:
                told = type(error).__name__
            self.unanswered[told] += 1
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"the tower at {self.url} did not answer in time: {told}")
            time.sleep(pause)
            pause = min(pause * 2, 1.0)


def enqueue_all(api: Api, specs: list[dict[str, Any]], over_s: float) -> dict[str, dict[str, Any]]:
    """Enqueue half of the tasks one by one and half in batches, spread over some seconds; return each by its id."""
    half = len(specs) // 2
    jobs = [[one] for one in specs[:half]] + [specs[start : start + _BATCH] for start in range(half, len(specs), _BATCH)]
    jobs.sort(key=lambda job: hashlib.sha256(job[0]["title"].encode()).digest())  # mixed, and alike in every run
    began = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as pool:
        ids = pool.map(lambda item: _enqueue(api, item[1], began + over_s * item[0] / len(jobs)), enumerate(jobs))
        return {task_id: one for some, job in zip(ids, jobs, strict=True) for task_id, one in zip(some, job, strict=True)}


def _enqueue(api: Api, job: list[dict[str, Any]], not_before: float) -> list[str]:
    time.sleep(max(0.0, not_before - time.monotonic()))
    if len(job) == 1:
        return [api.post("/tasks/enqueue", job[0])["task_id"]]
    return list(api.post("/tasks/enqueue/batch", {"tasks": job})["task_ids"])


def tasks_of(api: Api, run: str) -> dict[str, dict[str, Any]]:
    """Return every task that carries the label of this run, by id."""
    found: dict[str, dict[str, Any]] = {}
    query: dict[str, Any] = {"label": f"run:{run}", "limit": _PAGE}
    while True:
        page = api.get("/tasks", **query).json()
        found |= {task["id"]: task for task in page["tasks"]}
        if page["next_cursor"] is None:
            return found
        query["cursor"] = page["next_cursor"]


def wait(api: Api, run: str, count: int) -> dict[str, dict[str, Any]]:
    """Wait until that many tasks are final and traced, or the time is over; return what is there."""
    while True:
        found = tasks_of(api, run)
        done = sum(task["status"] in FINAL and task["trace_complete"] for task in found.values())
        if done >= count or time.monotonic() > api.deadline:
            return found
        time.sleep(0.25)


def check_set(accepted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    """Yield what was lost, and what is there twice."""
    yield from (f"{task_id}: accepted, and lost" for task_id in accepted.keys() - found.keys())
    yield from (f"{task_id}: {found[task_id]['title']} is there twice" for task_id in found.keys() - accepted.keys())


def check_task(task: dict[str, Any], events: list[dict[str, Any]]) -> Iterator[str]:
    """Yield which promises the row and the events of a task break."""
    kind, status = task["labels"]["kind"], task["status"]
    if status not in EXPECTED[kind]:
        yield f"a task of kind {kind} ended as {status}: {task['error']}"
    if not task["trace_complete"]:
        yield f"its trace is not complete: {task['trace_error']}"
    kinds = [event["kind"] for event in events]
    ends = [kind for kind in kinds if kind in FINAL]
    if ends != [status] or kinds[-1] != status or kinds[0] != "queued":
        yield f"its events do not lead from queued to one end: {kinds}"
    seqs = [event["seq"] for event in events]
    if seqs != sorted(set(seqs)):
        yield f"its events are out of order: {seqs}"
    starts = [event["attempt"] for event in events if event["kind"] == "started"]
    if starts != list(range(1, task["attempt"] + 1)):
        yield f"attempts {starts} are not 1 to {task['attempt']}"
    told = [kind for kind in kinds if kind in ("started", *BACK_TO_QUEUE, *FINAL)]
    if any(before == after == "started" for before, after in pairwise(told)):
        yield f"an attempt began before the one before ended: {told}"


def check_trace(one: dict[str, Any], task: dict[str, Any], events: list[dict[str, Any]], read: Callable[[str], str]) -> Iterator[str]:
    """Yield where the folder of a task does not say what its row and events say."""
    told, output = json.loads(read("input.json")), json.loads(read("output.json"))
    if (told["id"], told["payload"], told["labels"]) != (task["id"], one["payload"], one["labels"]):
        yield f"input.json tells of another task: {told}"
    if (output["id"], output["status"]) != (task["id"], task["status"]):
        yield f"output.json says {output['status']}, the row {task['status']}"
    if [made["attempt"] for made in output["attempts"]] != list(range(1, task["attempt"] + 1)):
        yield f"output.json tells of attempts {output['attempts']}"
    lines = read("events.jsonl").splitlines()
    if [{name: value for name, value in json.loads(line).items() if name != "previous"} for line in lines] != events:
        yield "events.jsonl and the events differ"
    hashes = ["", *(hashlib.sha256(line.encode()).hexdigest() for line in lines)]
    if [json.loads(line)["previous"] for line in lines] != hashes[:-1]:
        yield "the chain of events.jsonl is broken"
    log = read("log.txt")
    if f"── {task['status']}" not in log.splitlines()[-1] or log.count("── started") != task["attempt"]:
        yield f"log.txt does not tell the same: {log}"


def check_all(api: Api, accepted: dict[str, Any], found: dict[str, Any], traces: Path | None) -> list[str]:
    """Return every broken promise, in words."""

    def check(task_id: str) -> list[str]:
        task, events = found[task_id], api.get(f"/tasks/{task_id}/events").json()["events"]
        broken = list(check_task(task, events))
        if task["trace_complete"]:
            broken += check_trace(accepted[task_id], task, events, lambda name: _read(api, task_id, name, traces))
        return [f"{task_id}: {text}" for text in broken]

    with ThreadPoolExecutor(_CLIENTS) as pool:
        broken = [text for some in pool.map(check, accepted.keys() & found.keys()) for text in some]
    return [*check_set(accepted, found), *broken]


def _read(api: Api, task_id: str, name: str, traces: Path | None) -> str:
    if traces:
        return (traces / task_id / name).read_text()
    return str(api.get(f"/tasks/{task_id}/files/{name}").text)


def table(api: Api, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what came out of it, line by line."""
    tasks = list(found.values())
    counts = Counter((task["labels"]["kind"], task["status"]) for task in tasks)
    yield from (f"{kind:<12}{status:<12}{count:>6}" for (kind, status), count in sorted(counts.items()))
    begun = min(_seconds(task["created_at"]) for task in tasks)
    ended = max((_seconds(task["finished_at"]) for task in tasks if task["finished_at"]), default=begun)
    yield f"first accepted to last end    {ended - begun:8.1f} s   {len(tasks) / max(ended - begun, 0.001):.0f} tasks/s"
    p50, p99 = (1000 * value for value in _percentiles(api.latencies))
    yield f"POST p50, p99, most           {p50:8.1f} ms  {p99:.1f} ms  {1000 * max(api.latencies):.0f} ms  ({len(api.latencies)} answers)"
    yield f"attempts, workers lost        {sum(task['attempt'] for task in tasks):8}    {sum(task['losses'] for task in tasks)}"
    yield f"requests sent again           {sum(api.unanswered.values()):8}    {dict(api.unanswered)}"


def _percentiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return cuts[49], cuts[98]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def say(text: str) -> None:
    """Print a line at once, so that whoever kills things knows when."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the tower")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--over", type=float, default=0, metavar="SECONDS", help="spread the requests over this time")
    parser.add_argument("--http-url", help="what the http tasks ask, as a worker reaches it; the tower's /health if absent")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="read the trace folders here; through the API if absent")
    parser.add_argument("--seconds", type=float, default=300, help="give up after this time")
    return parser.parse_args()


def main() -> int:
    """Do it all; return the exit code."""
    asked = options()
    api = Api(asked.url, time.monotonic() + asked.seconds)
    run = uuid.uuid4().hex[:8]
    http_url = asked.http_url or f"{asked.url}/health"
    say(f"run {run}: {asked.tasks} tasks to {asked.url} over {asked.over:g} s")
    began = time.monotonic()
    accepted = enqueue_all(api, [spec(run, number, http_url) for number in range(asked.tasks)], asked.over)
    say(f"{len(accepted)} accepted after {time.monotonic() - began:.1f} s")
    found = wait(api, run, len(accepted))
    say(f"final and traced after {time.monotonic() - began:.1f} s")
    broken = check_all(api, accepted, found, asked.traces)
    for line in table(api, found):
        say(line)
    for text in broken[:_PROBLEMS_SHOWN]:
        say(f"BROKEN {text}")
    good = not broken and len(accepted) == asked.tasks
    say(f"{len(accepted)} of {asked.tasks} accepted, {len(broken)} broken promises")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
