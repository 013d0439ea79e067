"""What is kept for slots that become free: each start has a turn, and builds on the one before."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from actors.kept import Kept, Some


class _Watched(threading.Condition):
    """Tells when somebody begins to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Wait, and tell it first, unless there is nothing to wait for."""
        if not predicate():
            self.waits.release()
        return super().wait_for(predicate, timeout)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Three ids that the decision of token 7 has chosen; nobody who waits is impatient."""
    monkeypatch.setattr("actors.kept._TURN_S", 20)
    made = Kept()
    made._change = _Watched()
    made.put(["a", "b", "c"], 7)
    return made


@pytest.fixture
def pool() -> Any:
    """Threads for those who wait."""
    with ThreadPoolExecutor() as made:
        yield made


def _waiting(kept: Kept, pool: ThreadPoolExecutor, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Have a thread call this, and wait until that waits or is done."""
    called = pool.submit(call, *arguments)
    called.add_done_callback(lambda _: kept._change.waits.release())  # type: ignore[attr-defined]
    assert kept._change.waits.acquire(timeout=20)  # type: ignore[attr-defined]
    return called


def test_who_comes_during_the_turn_of_another_takes_what_is_left_after_it(kept: Kept, pool: ThreadPoolExecutor) -> None:
    """Else a slot would be idle until the next pass, though a task is kept for it."""
    first = kept.take(1)
    second = _waiting(kept, pool, kept.take, 1)
    kept.end(first, 8, is_good=True)
    assert (first, second.result(20)) == (Some(["a"], 7, 1), Some(["b"], 8, 1))


@pytest.mark.parametrize(("most", "is_good"), [(3, True), (1, False)])
def test_who_finds_nothing_after_the_turn_of_another_has_no_turn(kept: Kept, pool: ThreadPoolExecutor, most: int, is_good: bool) -> None:
    """A turn with nothing is never ended: nobody could start anything any more."""
    first = kept.take(most)
    second = _waiting(kept, pool, kept.take, 1)
    kept.end(first, 8, is_good=is_good)
    assert second.result(20) == Some()
    kept.put(["d"], 9)
    assert kept.take(1).ids == ["d"]


def test_nobody_waits_for_long(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn may last as long as the database is away: there is no second one meanwhile, but another choice."""
    monkeypatch.setattr("actors.kept._TURN_S", 0.01)
    first = kept.take(1)
    assert (kept.take(1), kept.count) == (Some(), 2)
    second = kept.put(["d"], 9)
    kept.end(first, 8, is_good=False)
    assert kept.is_good(second)
    assert kept.take(1) == Some(["d"], 9, second)


def test_a_choice_goes_before_the_starts_that_wait(kept: Kept, pool: ThreadPoolExecutor) -> None:
    """What it has chosen builds on the turn that it has waited for: after another start it would be void."""
    first = kept.take(1)
    second = _waiting(kept, pool, kept.take, 1)
    choice = _waiting(kept, pool, kept.put, ["d"], 9)
    kept.end(first, 8, is_good=True)
    assert choice.result(20) == 2
    assert second.result(20) == Some(["d"], 9, 2)


def test_those_that_start_are_found_where_they_have_arrived(kept: Kept) -> None:
    """And those of the next choice where that says."""
    kept.put(["a", "b"], 8, {"b": "(0,1)"})
    assert kept.take(2) == Some(["a", "b"], 8, 2, {"b": "(0,1)"})
    kept.end(Some(), 9, is_good=True)
    kept.put(["c"], 9)
    assert kept.take(1).places == {}
