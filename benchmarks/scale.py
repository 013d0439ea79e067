"""Measures that take minutes: a long queue, a long history, and things that are big."""

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from benchmarks.measures import Figures, latency, spread, throughput, warm
from benchmarks.stack import PAYLOAD, Stack, timed
from tests.servers import wait_for
from tower import db
from tower.models import Task, TaskEvent

#: Tasks of a short queue, tasks that are timed when a queue is opened, and how often.
_FEW, _BURST, _BURSTS = 1000, 500, 9
_ECHO = {"type": "echo", "payload": PAYLOAD}


def backlog(stack: Stack, waiting: int) -> Figures:
    """Tasks a second from the moment a queue is opened in which a thousand wait, and in which many do, with keys among them; medians."""
    warm(stack)
    few = _paces(stack, _FEW)
    many = _paces(stack, waiting - _FEW)
    return {"tasks/s with 1,000 waiting": few, f"tasks/s with {waiting:,} waiting": many, "ratio": round(many / few, 2)}


def _paces(stack: Stack, more: int) -> float:
    """Have so many more tasks wait, open the queue again and again for the first of them, and return their pace; others take their places.

    What the database does now and then, such as bringing a log into its file, meets few and many alike.
    """
    _fill(stack, more)
    paces = []
    for _ in range(_BURSTS):
        paces.append(_pace(stack))
        _fill(stack, _BURST)
    return median(paces)


def _fill(stack: Stack, more: int) -> None:
    """Pause the queue and have so many more tasks wait in it."""
    _post(stack, "/queues/default/pause")
    for _ in range(more // _BURST):
        tasks = [_ECHO if place % 10 else {**_ECHO, "concurrency_key": f"repo-{place % 40}"} for place in range(_BURST)]
        _post(stack, "/tasks/enqueue/batch", {"tasks": tasks})


def _pace(stack: Stack) -> float:
    """Open the queue, and return the pace of its first tasks."""
    queue = f"SELECT id FROM task WHERE status = 'queued' ORDER BY rank, id LIMIT {2 * _BURST}"
    first, last = (stack.ask(f"SELECT {which}(id) FROM ({queue}) AS waiting") for which in ("MIN", "MAX"))
    # Among these only: to count all that ended, many times a second, would measure itself. Those of a crowded key were left by others.
    ended = f"SELECT COUNT(*) FROM task WHERE id >= '{first}' AND id <= '{last}' AND status = 'succeeded' AND traced_seq >= seq"
    before = stack.ask(ended)

    def drain() -> None:
        _post(stack, "/queues/default/resume")
        wait_for("the first of the queue", lambda: stack.ask(ended) - before >= _BURST, 600)

    seconds = timed(drain)
    return round((stack.ask(ended) - before) / seconds, 1)


def history(stack: Stack, finished: int, tasks: int) -> Figures:
    """Throughput, latency, and lists on a database with many finished tasks, beside those on an empty one."""
    found: Figures = {}
    for name, prepare in (("empty", lambda: None), (f"{finished:,} finished", lambda: _make_history(stack, finished))):
        prepare()
        run = throughput(stack, tasks)
        found |= {f"{name}: {figure}": run[figure] for figure in ("tasks/s", "CPU ms/task")}
        found |= {f"{name}: latency {figure}": value for figure, value in latency(stack, 100).items()}
    newest = stack.client.get("/tasks", params={"limit": 1}).json()["tasks"][0]["id"]
    pages = {
        "list": "/tasks?limit=100",
        "by status": "/tasks?status=failed&limit=100",
        "by type": "/tasks?type=echo&status=succeeded&limit=100",
        "deep page": f"/tasks?limit=100&cursor={_middle(stack)}",
        "task": f"/tasks/{newest}",
        "why": f"/tasks/{newest}/why",
        "health": "/health/ready",
        "page of the tower": "/",
        "page of tasks": "/ui/tasks",
        "page of tasks, deep": f"/ui/tasks?cursor={_middle(stack)}",
        "page of tasks by status": "/ui/tasks?status=failed&retried=no",
        "page of tasks by type": "/ui/tasks?type=echo",
        "page of tasks by text": "/ui/tasks?text=nowhere-to-be-found",
        "page of tasks by time": "/ui/tasks?before=2020-01-01T00:00",
        "board": "/ui/tasks?view=board",
        "page of a task": f"/ui/tasks/{newest}",
        "page of its log": f"/ui/tasks/{newest}/log",
    }
    for name, path in pages.items():
        stack.client.get(path).raise_for_status()
        times = [timed(lambda path=path: stack.client.get(path).raise_for_status()) * 1000 for _ in range(50)]  # type: ignore[misc]
        found[f"GET {name}, p95 ms"] = spread(times)["p95 ms"]
    return found


def _middle(stack: Stack) -> str:
    count = int(stack.ask("SELECT COUNT(*) FROM task")) // 2
    return str(stack.ask(f"SELECT id FROM task ORDER BY id LIMIT 1 OFFSET {count}"))


def _make_history(stack: Stack, finished: int) -> None:
    """Copy the newest finished task so often, with its events, as if they had ended over the last days; every tenth failed."""
    table = {model._meta.table_name: [field.column_name for field in model._meta.sorted_fields] for model in (Task, TaskEvent)}
    with db.database.connection_context():
        run = _statement
        ((model_id,),) = run("SELECT MAX(id) FROM task WHERE status = 'succeeded'").fetchall()
        numbers = (
            f"SELECT generate_series(1, {finished}) AS n"
            if db.is_postgres()
            else f"WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {finished}) SELECT n FROM c"
        )
        made = "substr(id, 1, 24) || lpad(CAST(n AS text), 12, '0')" if db.is_postgres() else "substr(id, 1, 24) || printf('%012d', n)"
        back = f"(n % {2 * 86_400})"
        changed = {
            "id": made,
            "correlation_id": made,
            "status": "CASE WHEN n % 10 = 0 THEN 'failed' ELSE status END",
            **{at: f"{at} - {back}" for at in ("created_at", "finished_at", "updated_at", "queued_at", "rank")},
        }
        with db.database.atomic():
            if db.is_postgres():
                run("SET LOCAL statement_timeout = 0")
            taken = ", ".join(changed.get(column, column) for column in table["task"])
            run(f"INSERT INTO task ({', '.join(table['task'])}) SELECT {taken} FROM task, ({numbers}) AS ns WHERE id = '{model_id}'")
            taken = ", ".join({"task_id": made.replace("id", "task_id", 1)}.get(column, column) for column in table["task_event"])
            columns = ", ".join(table["task_event"])
            run(f"INSERT INTO task_event ({columns}) SELECT {taken} FROM task_event, ({numbers}) AS ns WHERE task_id = '{model_id}'")
        # A history that grows by and by is looked after by and by. This one would have a core of Postgres at it for a minute, or leave
        # SQLite a log of gigabytes, in which each page would be looked for first.
        if db.is_postgres():
            run("SET statement_timeout = 0")
            run("VACUUM (ANALYZE) task, task_event")
        else:
            wait_for("the log to be in its file", lambda: run("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, 120)


def _statement(text: str) -> Any:
    return db.database.execute_sql(text.replace("%", "%%") if db.is_postgres() else text)


def big(stack: Stack, megabytes: int = 100, followers: int = 1000) -> Figures:
    """Memory, and the latency of small tasks, while a log of 100 MB is written, a result of 10 MB returned, and a log followed by many."""
    quiet = latency(stack, 60)
    line = "x" * 200
    program = f"import sys\nfor n in range({megabytes * 1_000_000 // 201}): print('{line}')"
    log = _post(stack, "/tasks/enqueue", {"type": "command", "payload": {"argv": ["python3", "-c", program]}, "timeout_s": 600})
    during, seconds = _meanwhile(stack, lambda: _wait(stack, log["task_id"]))
    found = {"small tasks alone, p50 ms": quiet["p50 ms"], "p50 ms beside a large log": during["p50 ms"], "large log, s": seconds}
    found["log.txt, MB"] = round((stack.traces / log["task_id"] / "log.txt").stat().st_size / 1e6, 1)
    result = _post(stack, "/tasks/enqueue", {"type": "echo", "payload": {"text": "y" * 9_000_000}})
    found["result of 9 MB, s"] = round(timed(lambda: _wait(stack, result["task_id"])), 1)
    slow = _post(stack, "/tasks/enqueue", {"type": "command", "payload": {"argv": ["sleep", "25"]}})
    with ExitStack() as streams:
        began = time.perf_counter()
        for _ in range(followers):
            streams.enter_context(_Follower(stack, slow["task_id"]))
        found[f"{followers} followers, s to connect"] = round(time.perf_counter() - began, 1)
        found["p50 ms beside followers"] = latency(stack, 60)["p50 ms"]
        found |= {f"MB, {name}": value for name, value in stack.memory_mb().items()}
    return found


class _Follower:
    """Somebody who follows a log and reads no more than the head: a bare socket, so that a thousand of them cost little here."""

    def __init__(self, stack: Stack, task_id: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", stack.port), timeout=60)
        self._request = f"GET /tasks/{task_id}/log?follow=true HTTP/1.1\r\nHost: 127.0.0.1:{stack.port}\r\n\r\n"

    def __enter__(self) -> "_Follower":
        self._socket.sendall(self._request.encode())
        head = self._socket.recv(4096)
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()


def _meanwhile(stack: Stack, wait: Callable[[], object]) -> tuple[Figures, float]:
    """Return the latency of small tasks while something else runs, and how many seconds that took."""
    seconds: list[float] = []
    waiting = threading.Thread(target=lambda: seconds.append(timed(wait)))
    waiting.start()
    figures = latency(stack, 60, is_warm=True)
    waiting.join()
    return figures, round(seconds[0], 1)


def _wait(stack: Stack, task_id: str) -> None:
    while not (stack.traces / task_id / "output.json").exists():
        time.sleep(0.05)


def _post(stack: Stack, path: str, body: dict[str, Any] | None = None) -> Any:
    answer = stack.client.post(path, json=body or {})
    if answer.is_error:
        raise RuntimeError(f"{path}: {answer.status_code} {json.dumps(answer.json())[:500]}")
    return answer.json()
