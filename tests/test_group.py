"""Threads that share work: one does it for all, each gets its own result, and nobody suffers for another."""

import asyncio
import gc
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.servers import wait_for
from tower.errands import Errand, Threads
from tower.errors import Unavailable
from tower.group import Gathering, Group, Told


def together(group: Group[int, int], numbers: Sequence[int], busy: threading.Event, go_on: threading.Event) -> dict[int, Any]:
    """Ask for all of these while the first piece of work is under way; return results and errors by number."""
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        try:
            found[number] = group.do(number)
        except Exception as error:
            found[number] = str(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in numbers]
    threads[0].start()
    assert busy.wait(10)
    for thread in threads[1:]:
        thread.start()
    wait_for("the others", lambda: len(group._waiting) == len(numbers) - 1)
    go_on.set()
    for thread in threads:
        thread.join(10)
    return found


@pytest.fixture
def shared() -> tuple[Callable[[Callable[[list[int]], list[int]]], Group[int, int]], threading.Event, threading.Event, list[list[int]]]:
    """A group whose first piece of work waits for a word, the word, and what was done together."""
    busy, go_on, done = threading.Event(), threading.Event(), list[list[int]]()

    def make(work: Callable[[list[int]], list[int]]) -> Group[int, int]:
        def wait_first(items: list[int]) -> list[int]:
            done.append(items)
            busy.set()
            assert go_on.wait(10)
            return work(items)

        return Group(wait_first, most=3)

    return make, busy, go_on, done


def test_what_comes_together_is_done_together(shared: Any) -> None:
    """In order, as many as may, and each with its own result."""
    make, busy, go_on, done = shared
    found = together(make(lambda items: [item * 10 for item in items]), range(6), busy, go_on)
    assert found == {number: number * 10 for number in range(6)}
    assert sorted(len(items) for items in done) == [1, 2, 3]


def test_one_that_fails_fails_alone(shared: Any) -> None:
    """The others are tried without it."""

    def work(items: list[int]) -> list[int]:
        if 2 in items:
            raise ValueError("two")
        return items

    make, busy, go_on, _ = shared
    assert together(make(work), range(4), busy, go_on) == {0: 0, 1: 1, 2: "two", 3: 3}


def test_a_database_that_is_away_is_waited_for_once(shared: Any) -> None:
    """Not by each one after the other."""

    def work(items: list[int]) -> list[int]:
        raise Unavailable("away")

    make, busy, go_on, done = shared
    assert together(make(work), range(4), busy, go_on) == dict.fromkeys(range(4), "away")
    assert len(done) == 2


def test_coroutines_that_come_together_are_served_together() -> None:
    """By a thread, in order; who fails fails alone, and who is cancelled before his turn is left out."""
    go_on, done = threading.Event(), list[list[int]]()

    def work(items: list[int]) -> list[int]:
        done.append(items)
        assert go_on.wait(10)
        if 3 in items:
            raise ValueError("three")
        return [item * 10 for item in items]

    async def ask() -> list[Any]:
        gathering = Gathering(work, most=3)
        asked = [asyncio.create_task(gathering.do(number)) for number in range(6)]
        while not done:
            await asyncio.sleep(0)
        asked[5].cancel()
        go_on.set()
        return await asyncio.gather(*asked, gathering.do(6), return_exceptions=True)

    *found, failed, four, cancelled, six = asyncio.run(ask())
    assert (found, str(failed), four, six) == ([0, 10, 20], "three", 40, 60)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert done[0] in ([0], [0, 1, 2])
    assert {number for items in done for number in items} == {0, 1, 2, 3, 4, 6}


def test_what_is_sent_needs_no_thread_unless_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """At once, in order, and together with what comes meanwhile; a mistake is not passed over in silence."""
    sent, worked = list[list[int]](), list[list[int]]()

    def send(items: list[int], told: Told[int]) -> bool:
        sent.append(items)
        if items[0] == 2:
            return False
        if items[0] == 3:
            raise ValueError("not to be sent")
        results = None if items[0] == 4 else [item * 10 for item in items]
        if items[0] == 5:
            told(results)
        else:
            asyncio.get_running_loop().call_later(0.01, told, results)
        return True

    def work(items: list[int]) -> list[int]:
        worked.append(items)
        return [item * 100 for item in items]

    async def ask() -> list[Any]:
        gathering = Gathering(work, send)
        found = list(await asyncio.gather(*map(gathering.do, (0, 6, 7))))
        for number in (2, 3, 4, 5):
            found += await asyncio.gather(gathering.do(number), return_exceptions=True)
        await gathering.stop()
        return [str(one) for one in found]

    assert asyncio.run(ask()) == ["0", "60", "70", "200", "300", "400", "50"]
    assert (sent, worked) == ([[0], [6, 7], [2], [3], [4], [5]], [[2], [3], [4]])
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["not to be sent"]


def test_many_who_are_told_at_once_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer that served the next before it returned would be a few calls deeper."""
    monkeypatch.setattr("tower.group._TURN_S", 60.0)
    depths = list[int]()

    def send(items: list[int], told: Callable[[list[int] | None], None]) -> bool:
        depths.append(len(traceback.extract_stack()))
        told(items)
        return True

    async def work() -> None:
        gathering = Gathering(lambda items: items, send, most=1)
        assert await asyncio.gather(*(gathering.do(number) for number in range(20))) == list(range(20))

    asyncio.run(work())
    assert max(depths) - min(depths) < 10


def test_a_database_that_is_away_is_waited_for_once_by_all_who_wait() -> None:
    """Also by those for whom there was no room in the batch, and by those that are tried alone."""
    done = list[list[int]]()

    def work(items: list[int]) -> list[int]:
        done.append(items)
        if items == [9]:
            return items
        if items != [0] and (len(items) == 1 or 3 in items):
            raise Unavailable("away")
        raise ValueError("together")

    async def ask() -> list[Any]:
        gathering = Gathering(work, most=3)
        return await asyncio.gather(*map(gathering.do, (9, *range(6))), return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["9", "together", "away", "away", "away", "away", "away"]
    assert done == [[9], [0, 1, 2], [0], [1]]


def test_whoever_comes_late_in_an_outage_tries_it_himself() -> None:
    """Only who came in the first half of it has waited nearly as long, and is told with the one who has tried."""
    go_on, done = threading.Event(), list[list[int]]()

    def work(items: list[int]) -> list[int]:
        done.append(items)
        assert go_on.wait(10)
        raise Unavailable("away")

    async def ask() -> list[Any]:
        gathering = Gathering(work)
        asked = [asyncio.create_task(gathering.do(number)) for number in range(6)]
        await asyncio.sleep(0.5)
        asked.append(asyncio.create_task(gathering.do(6)))
        await asyncio.sleep(0)
        go_on.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [str(error) for error in asyncio.run(ask())] == ["away"] * 7
    assert done == [[0], [6]]


def test_whoever_stops_while_another_loop_asks_is_not_forgotten() -> None:
    """And an answer to the one loop is none to what the other has sent since."""
    sent = list[Told[int]]()

    def send(items: list[int], told: Told[int]) -> bool:
        sent.append(told)
        return True

    gathering = Gathering(lambda items: items, send)

    async def second() -> None:
        asked = asyncio.create_task(gathering.do(2))
        await asyncio.sleep(0)
        sent[1]([20])
        assert await asked == 20

    async def first() -> None:
        asked = asyncio.create_task(gathering.do(1))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(gathering.stop())
        await asyncio.sleep(0)
        await asyncio.to_thread(lambda: asyncio.run(second()))
        again = asyncio.create_task(gathering.do(3))
        await asyncio.sleep(0)
        sent[0]([10])
        assert (await asked, bool(gathering._sent)) == (10, True)
        sent[2]([30])
        assert await again == 30
        await asyncio.wait_for(stopping, 10)

    asyncio.run(first())


def test_whoever_waits_when_a_gathering_stops_is_left_out() -> None:
    """And it has stopped when the work under way is done."""
    busy, go_on, done = threading.Event(), threading.Event(), list[list[int]]()

    def work(items: list[int]) -> list[int]:
        busy.set()
        assert go_on.wait(10)
        done.append(items)
        return items

    async def ask() -> list[Any]:
        gathering = Gathering(work, most=1)
        asked = [asyncio.create_task(gathering.do(number)) for number in range(3)]
        await asyncio.to_thread(busy.wait, 10)
        threading.Timer(0.1, go_on.set).start()
        await gathering.stop()
        assert done == [[0]]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert first == 0
    assert [type(error) for error in others] == [asyncio.CancelledError] * 2
    assert done == [[0]]


def test_work_that_forgets_somebody_keeps_nobody_waiting() -> None:
    """Whatever goes wrong, each gets an answer."""

    async def ask() -> list[Any]:
        gathering: Gathering[int, int] = Gathering(lambda items: items[:1] if len(items) > 1 else [])
        return await asyncio.gather(*(gathering.do(number) for number in range(3)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(ask())] == [ValueError] * 3


def test_a_gathering_serves_one_loop_after_the_other() -> None:
    """Also when the last one was closed in the midst of it."""
    go_on = threading.Event()

    def work(items: list[int]) -> list[int]:
        assert go_on.wait(10)
        return items

    gathering = Gathering(work)

    async def leave() -> None:
        asked = asyncio.create_task(gathering.do(1))
        await asyncio.sleep(0)
        asked.cancel()
        threading.Timer(0.1, go_on.set).start()

    asyncio.run(leave())
    assert asyncio.run(gathering.do(2)) == 2


def test_whoever_comes_while_a_gathering_stops_is_served_after_all() -> None:
    """By a thread of its own."""
    busy, go_on = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        busy.set()
        assert go_on.wait(10)
        return items

    async def ask() -> list[int]:
        gathering = Gathering(work)
        first = asyncio.create_task(gathering.do(1))
        await asyncio.to_thread(busy.wait, 10)
        stopping = asyncio.create_task(gathering.stop())
        await asyncio.sleep(0)
        late = asyncio.create_task(gathering.do(2))
        await asyncio.sleep(0)
        go_on.set()
        await stopping
        return [await first, await asyncio.wait_for(late, 10), await asyncio.wait_for(gathering.do(3), 10)]

    assert asyncio.run(ask()) == [1, 2, 3]


def test_a_system_without_threads_is_told_and_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for a thread that was never started."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def ask() -> int:
        gathering: Gathering[int, int] = Gathering(lambda items: items)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                await asyncio.wait_for(gathering.do(1), 10)
        return await asyncio.wait_for(gathering.do(2), 10)

    assert asyncio.run(ask()) == 2


@pytest.mark.parametrize("do", [lambda work: Group(work).do(1), lambda work: asyncio.run(Gathering(work).do(1))], ids=["threads", "loop"])
def test_an_error_keeps_nothing_alive(do: Callable[[Callable[[list[int]], list[int]]], int]) -> None:
    """A connection that it met would stay open, and SQLite would go on taking its file for read-only."""

    class Connection:
        pass

    seen: list[weakref.ref[Connection]] = []

    def meet() -> None:
        connection = Connection()
        seen.append(weakref.ref(connection))
        raise OSError("away")

    def work(items: list[int]) -> list[int]:
        try:
            meet()
        except OSError as error:
            raise ValueError("no") from error
        return items

    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            do(work)
        assert seen[0]() is None
    finally:
        gc.enable()


def test_an_errand_does_together_what_it_is_asked_for_meanwhile_and_outlives_failures() -> None:
    """One after the other, in one thread; asked to stop, it does the rest first."""
    busy, go_on, done = threading.Event(), threading.Event(), list[list[str]]()

    def work(asked: Sequence[str]) -> None:
        done.append(list(asked))
        busy.set()
        assert go_on.wait(10)
        if len(done) == 1:
            raise Unavailable("away")
        raise ValueError("broken")

    errand = Errand("test", work)
    errand.start()
    errand.ask("a")
    assert busy.wait(10)
    for task_id in ("b", "c", "b"):
        errand.ask(task_id)
    go_on.set()
    wait_for("the second", lambda: len(done) == 2)
    errand.ask("d")
    errand.stop()
    assert done == [["a"], ["b", "c"], ["d"]]


def test_an_errand_that_is_asked_for_many_things_at_a_time_takes_its_time() -> None:
    """It begins no sooner than that after it began."""
    began = list[float]()
    errand = Errand("test", lambda asked: began.append(time.monotonic()), loaded_s=0.2)
    for number in range(9):
        errand.ask(str(number))
    errand.start()
    wait_for("the many", lambda: bool(began))
    errand.ask("one more")
    wait_for("the one", lambda: len(began) == 2)
    errand.stop()
    assert began[1] - began[0] >= 0.2


def test_an_errand_that_can_be_asked_takes_its_time_only_while_it_can_wait() -> None:
    """However many things it is asked for: what it has time for may be over at any moment."""
    began, can_wait = list[float](), True
    errand = Errand("test", lambda asked: began.append(time.monotonic()), loaded_s=1e9, can_wait=lambda: can_wait)
    for number in range(9):
        errand.ask(str(number))
    errand._began_at = time.monotonic()
    errand.start()
    errand._thread.join(0.1)
    assert not began
    can_wait = False
    wait_for("the many", lambda: bool(began))
    errand.ask("one more")
    wait_for("the one", lambda: len(began) == 2)
    can_wait = True
    errand.ask("the last")
    errand.stop()
    assert len(began) == 3


def test_an_errand_with_enough_waits_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it was asked for so many things, however soon more may come, or for no more in a moment: it began just now in both cases."""
    began = list[int]()
    errand = Errand("test", lambda asked: began.append(len(asked)), 1e9, enough=20)
    errand._began_at = time.monotonic()
    with monkeypatch.context() as never_quiet:
        never_quiet.setattr("tower.errands._QUIET_S", 1e9)
        errand.start()
        errand.ask(*map(str, range(20)))
        wait_for("enough", lambda: began == [20])
    errand.ask(*map(str, range(19)))
    wait_for("what no more came after", lambda: began == [20, 19])
    errand.stop()


def test_an_errand_with_enough_leaves_what_is_more_but_not_enough() -> None:
    """It takes that with what comes next, or when no more comes; asked to stop, it takes all."""
    began = list[str]()
    errand = Errand("test", lambda asked: began.append(" ".join(asked)), 1e9, enough=2)
    errand._began_at = time.monotonic()
    errand.ask(*"abcde")
    errand.start()
    wait_for("the rest", lambda: began == ["a b c d", "e"])
    errand.ask(*"fgh")
    errand.stop()
    assert began == ["a b c d", "e", "f g", "h"]


def test_an_errand_with_enough_waits_for_more_while_more_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it does it together."""
    began = list[int]()
    errand = Errand("test", lambda asked: began.append(len(asked)), 1e9, enough=20)
    errand._began_at = time.monotonic()
    # So that a stall of ours is no silence; still less than how long ago it would seem to have been asked if nobody noted when.
    monkeypatch.setattr("tower.errands._QUIET_S", min(60.0, time.monotonic() / 2))
    errand.ask("one")
    errand.start()
    errand._thread.join(0.1)
    assert not began
    errand.stop()
    assert began == [1]


def test_threads_are_kept_and_never_too_few() -> None:
    """As many as there are calls at once, and no more."""
    threads, names, all_here = Threads("kept"), list[int](), threading.Barrier(4)

    def call() -> None:
        all_here.wait(10)
        names.append(threading.get_ident())

    for _ in range(3):
        for _ in range(3):
            threads.run(call)
        all_here.wait(10)
        wait_for("idle threads", lambda: threads._idle == 3)
    assert len(set(names)) == 3
    assert len(names) == 9
