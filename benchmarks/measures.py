"""What is measured; each takes a stack and returns figures by name."""

import asyncio
import json
import os
import re
import statistics
import time

from benchmarks.stack import PAYLOAD, Stack, timed
from tower.spec import TaskSpec

Figures = dict[str, float]

_WARM = 200
_SPEC = {"type": "echo", "payload": PAYLOAD}


def warm(stack: Stack) -> None:
    """Run some tasks."""
    stack.client.post("/tasks/enqueue/batch", json={"tasks": [_SPEC] * _WARM}).raise_for_status()
    stack.wait_all_done()


def throughput(stack: Stack, tasks: int) -> Figures:
    """Tasks submitted one by one, until all have ended and are traced: by the engine on services, over HTTP when embedded."""
    warm(stack)
    cpu, own = stack.cpu_s(), sum(os.times()[:2])
    submit = _submit_by_engine if stack.mode == "services" else _submit_over_http
    began = time.perf_counter()
    submitting = timed(lambda: submit(stack, tasks))
    own = sum(os.times()[:2]) - own
    stack.wait_all_done()
    seconds = time.perf_counter() - began
    used = {name: (value - cpu[name]) / tasks * 1000 for name, value in stack.cpu_s().items()}
    parts = {f"CPU ms/task, {name}": round(value, 2) for name, value in used.items()}
    total = round(sum(used.values()) + own / tasks * 1000, 2)
    return {"tasks/s": round(tasks / seconds, 1), "submitted/s": round(tasks / submitting, 1), "CPU ms/task": total, **parts}


def _submit_by_engine(stack: Stack, tasks: int) -> None:
    engine = stack.engine()
    spec = TaskSpec.model_validate(_SPEC)

    async def submit() -> None:
        await engine.start()
        for _ in range(tasks):
            await engine.enqueue(spec)
        await engine.stop()

    asyncio.run(submit())


def _submit_over_http(stack: Stack, tasks: int) -> None:
    for _ in range(tasks):
        stack.client.post("/tasks/enqueue", json=_SPEC).raise_for_status()


def latency(stack: Stack, tasks: int = 200, *, is_warm: bool = False) -> Figures:
    """Milliseconds from the answer to a POST until its trace is complete, one task every 50 ms; and with the POST itself."""
    if not is_warm:
        warm(stack)
    times, whole = [], []
    for _ in range(tasks):
        began = time.perf_counter()
        task_id = stack.client.post("/tasks/enqueue", json=_SPEC).raise_for_status().json()["task_id"]
        answered = time.perf_counter()
        output = stack.traces / task_id / "output.json"
        while not output.exists():
            time.sleep(0.0005)
        ended = time.perf_counter()
        times.append((ended - answered) * 1000)
        whole.append((ended - began) * 1000)
        time.sleep(0.05)
    return {**spread(times), "p50 ms with the POST": spread(whole)["p50 ms"]}


def many_clients(stack: Stack, requests: int, clients: int = 64) -> Figures:
    """POSTs a second of clients at once, and milliseconds of each, and those of a bare FastAPI on the same database.

    The tasks are for later, so that nothing else is at work.
    """
    body = {**_SPEC, "not_before": "2500-01-01T00:00:00Z"}
    ours, bare = _paced(stack.port, body, requests, clients), _paced(stack.open_bare(), body, requests, clients)
    beside = {f"{name}, a bare FastAPI": value for name, value in bare.items()}
    return {**ours, **beside, "ratio": round(ours["requests/s"] / bare["requests/s"], 2)}


def _paced(port: int, body: dict[str, object], requests: int, clients: int) -> Figures:
    """Post once every client has been answered, which opens connections and threads; return POSTs a second and milliseconds of each."""
    _post_at_once(port, body, clients, clients)
    times = list[float]()
    seconds = timed(lambda: times.extend(_post_at_once(port, body, requests, clients)))
    return {"requests/s": round(len(times) / seconds, 1), **spread(times)}


def connections(stack: Stack, tasks: int, clients: int = 32) -> Figures:
    """Tasks submitted by clients at once over HTTP, until all have ended and are traced."""
    warm(stack)
    began = time.perf_counter()
    posted = len(_post_at_once(stack.port, _SPEC, tasks, clients))
    stack.wait_all_done()
    return {"tasks/s": round(posted / (time.perf_counter() - began), 1)}


def _post_at_once(port: int, body: dict[str, object], requests: int, clients: int) -> list[float]:
    """Enqueue a task again and again, and return how many milliseconds each answer took.

    The bytes of the requests are written by hand: an HTTP client would cost more than the server, and both share the cores.
    """
    content = json.dumps(body)
    head = f"POST /tasks/enqueue HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    times = list[float]()

    async def ask(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(count):
            began = time.perf_counter()
            writer.write((head + content).encode())
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", answer)
            assert answer.startswith(b"http/1.1 202 ") and length, answer
            await reader.readexactly(int(length[1]))
            times.append((time.perf_counter() - began) * 1000)
        writer.close()

    async def ask_all() -> None:
        await asyncio.gather(*(ask(requests // clients) for _ in range(clients)))

    asyncio.run(ask_all())
    return times


def batches(stack: Stack, tasks: int) -> Figures:
    """Tasks submitted a hundred at a time over HTTP, until all have ended and are traced."""
    warm(stack)
    began = time.perf_counter()
    for _ in range(tasks // 100):
        stack.client.post("/tasks/enqueue/batch", json={"tasks": [_SPEC] * 100}).raise_for_status()
    stack.wait_all_done()
    return {"tasks/s": round(tasks / (time.perf_counter() - began), 1)}


def idle(stack: Stack, seconds: float = 20) -> Figures:
    """Per cent of a core that a tower uses with nothing to do, and its memory."""
    warm(stack)
    time.sleep(5)
    before = stack.cpu_s()
    time.sleep(seconds)
    used = {name: round((value - before[name]) / seconds * 100, 2) for name, value in stack.cpu_s().items()}
    return {
        "% of a core": round(sum(used.values()), 2),
        **{f"%, {name}": value for name, value in used.items()},
        **{f"MB, {name}": value for name, value in stack.memory_mb().items()},
    }


def spread(times: list[float]) -> Figures:
    """Return the middle and the upper ends of some times."""
    cuts = statistics.quantiles(times, n=100)
    return {"p50 ms": round(cuts[49], 1), "p95 ms": round(cuts[94], 1), "p99 ms": round(cuts[98], 1)}
