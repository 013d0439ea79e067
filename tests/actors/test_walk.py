"""What a walk over waiting tasks learns from those it leaves."""

from collections import Counter

from actors.walk import Walk
from tests.test_decision import row
from tower.decision import KEY, Load


def test_a_walk_learns_from_each_kind_of_task_that_it_left() -> None:
    """Of those that are restricted alike from one; what restricts some keeps no others."""
    running = Counter({(KEY, "k1"): 1, (KEY, "k2"): 1})
    load = Load(100.0, 10, {"a": 10}, running, {"k1": 1, "k2": 1}, {"r1": [97.0], "r2": [98.0]})
    walk = Walk(load, None)
    rate = {"rate_limit": 1, "rate_per_s": 5.0}
    walk._learn([row(1), row(2, rate_key="r2", **rate), row(3, rate_key="r1", **rate)])
    assert not walk.is_held_up  # the clock alone frees them
    keys = ("k1", "k1", "k2", "k3", "k1")
    held = [row(number, concurrency_key=key) for number, key in enumerate(keys)]
    walk._learn([*held, row(5, concurrency_key="k1", concurrency_limit=2), row(6, rate_key="r1", **rate)])
    assert walk._blocked_keys == {("k1", 1), ("k1", 2), ("k2", 1)}
    assert walk._blocked_rates == {("r1", 1, 5.0), ("r2", 1, 5.0)}
    assert walk.frees_at == 102.0
    assert walk.is_held_up
