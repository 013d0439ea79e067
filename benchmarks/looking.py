"""What looking at a tower costs: the page of a large log, and many who follow while tasks run."""

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.measures import Figures, latency, spread
from benchmarks.stack import Stack, timed

_LINE = "x" * 200
_PRINTS = "import time\nfor n in range(100000): print('line', n, flush=True); time.sleep(.1)"


def pages(stack: Stack, megabytes: int = 100, followers: int = 200) -> Figures:
    """Milliseconds of the page of a large log, memory, and the latency of small tasks while many follow a log or the first page."""
    quiet, before = latency(stack, 60), stack.memory_mb()["server 0"]
    program = f"for n in range({megabytes * 1_000_000 // 201}): print('{_LINE}')"
    large = _start(stack, program)
    while not (stack.traces / large / "output.json").exists():
        time.sleep(0.05)
    last = megabytes * 1_000_000 // 201
    found = {"small tasks alone, p50 ms": quiet["p50 ms"], "server, MB": before, "server after the log, MB": stack.memory_mb()["server 0"]}
    page = f"/ui/tasks/{large}/log"
    found["page of its log, first time, ms"] = round(_ask(stack, page)[0], 1)
    for name, query in (("the end", ""), ("the middle", f"?line={last // 2}"), ("a piece", "/lines?first=100000&count=200")):
        path = page.removesuffix("/log") + query if query.startswith("/") else page + query
        found[f"{name}, p95 ms"] = spread([_ask(stack, path)[0] for _ in range(50)])["p95 ms"]
    found["the page, KB"] = round(_ask(stack, page)[1] / 1000, 1)
    found["a search that finds nothing, s"] = round(_ask(stack, page + "?find=nowhere")[0] / 1000, 1)
    found["server after looking, MB"] = stack.memory_mb()["server 0"]
    slow = _start(stack, _PRINTS)
    while stack.client.get(f"/tasks/{slow}").json()["status"] != "running":
        time.sleep(0.05)
    for what, follow in (("followers of a log", _follow_log), ("who look at the first page", _look)):
        times: list[float] = []
        with _many(followers, lambda follow=follow, times=times: follow(stack.port, slow, times)):  # type: ignore[misc]
            time.sleep(5)
            times.clear()
            found[f"{followers} {what}: small tasks, p50 ms"] = latency(stack, 100, is_warm=True)["p50 ms"]
            found[f"{followers} {what}: server, MB"] = stack.memory_mb()["server 0"]
            if times:
                found[f"{followers} {what}: an answer, p50 ms"] = round(statistics.median(times), 1)
    stack.client.post(f"/tasks/{slow}/cancel")
    return found


def _start(stack: Stack, program: str) -> str:
    body = {"type": "command", "payload": {"argv": ["python3", "-c", program]}, "timeout_s": 600}
    return str(stack.client.post("/tasks/enqueue", json=body).raise_for_status().json()["task_id"])


def _ask(stack: Stack, path: str) -> tuple[float, int]:
    """Return how many milliseconds an answer took, and its bytes."""
    sizes: list[int] = []
    seconds = timed(lambda: sizes.append(len(stack.client.get(path).raise_for_status().content)))
    return seconds * 1000, sizes[0]


@contextmanager
def _many(count: int, one: Callable[[], Coroutine[Any, Any, None]]) -> Iterator[None]:
    """Keep so many at it, in a thread of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = [asyncio.run_coroutine_threadsafe(one(), loop) for _ in range(count)]
    try:
        yield
        for future in running:
            if future.done():
                future.result()
    finally:
        for future in running:
            future.cancel()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.5), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _follow_log(port: int, task_id: str, times: list[float]) -> None:
    """Ask for the lines that came, as the script of the page does."""
    first = 1
    while True:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        asked = f"GET /ui/tasks/{task_id}/lines?first={first}&count=200 HTTP/1.1"
        writer.write(f"{asked}\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        writer.close()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(head.decode())
        first += body.count(b'id=\\"L')
        took = time.perf_counter() - began
        times.append(took * 1000)
        await asyncio.sleep(max(1.0, 5 * took))


async def _look(port: int, task_id: str, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n\r\n".encode())
    while await reader.read(65536):
        pass
    raise RuntimeError("the stream has ended")
