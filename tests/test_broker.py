"""The broker: embedded and on a real Redis, there and not there."""

import logging
import signal
import threading
import time
from collections.abc import Iterator

import dramatiq
import pytest

from tests.servers import Redis, free_port, wait_for
from tower.broker import Nudger, open_broker
from tower.errands import Errand
from tower.settings import Settings


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """A Redis that the test may break."""
    server = Redis().start()
    yield server
    server.close()


@pytest.fixture(params=["embedded", "redis"])
def broker(request: pytest.FixtureRequest) -> Iterator[dramatiq.Broker]:
    url = request.getfixturevalue("redis_server").url() if request.param == "redis" else None
    made = open_broker(Settings(redis_url=url))
    yield made
    made.flush_all()
    made.close()


def listen(broker: dramatiq.Broker, heard: list[str], wanted: int) -> threading.Event:
    done = threading.Event()

    def hear(task_id: str) -> None:
        heard.append(task_id)
        if len(heard) >= wanted:
            done.set()

    dramatiq.actor(actor_name="ear", queue_name="ears", broker=broker)(hear)
    return done


def test_a_nudge_reaches_its_actor(broker: dramatiq.Broker) -> None:
    """With the task's id and nothing else."""
    heard: list[str] = []
    done = listen(broker, heard, 20)
    worker = dramatiq.Worker(broker, worker_threads=2, worker_timeout=100)
    worker.start()
    assert all(Nudger(broker).send("ear", str(number)) for number in range(20))
    assert done.wait(10)
    worker.stop()
    assert sorted(heard, key=int) == [str(number) for number in range(20)]


def test_an_idle_worker_waits_inside_redis_and_keeps_the_order(redis_server: Redis) -> None:
    """It blocks on the list instead of asking again and again, and takes the oldest first."""
    broker = open_broker(Settings(redis_url=redis_server.url()))
    broker.client.config_resetstat()  # type: ignore[attr-defined]
    heard: list[str] = []
    done = listen(broker, heard, 30)
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    stats = broker.client  # type: ignore[attr-defined]
    wait_for("the consumer to block", lambda: stats.info("clients")["blocked_clients"] > 0, 5)
    nudger = Nudger(broker)
    for number in range(30):
        nudger.send("ear", str(number))
    assert done.wait(10)
    worker.stop()
    assert heard == [str(number) for number in range(30)]


def test_a_nudge_for_a_thread_of_this_process_goes_straight_there(redis_server: Redis) -> None:
    """Not by way of dramatiq's threads; what is no nudge is left to them."""
    broker = open_broker(Settings(redis_url=redis_server.url()))
    redis, heard, asked = broker.client, list[str](), list[str]()  # type: ignore[attr-defined]
    listen(broker, heard, 2)
    errand = Errand("ear", asked.extend)
    errand.start()
    nudger = Nudger(broker)
    nudger.send("ear", "task")
    for wrong in ((), ("a", "b"), (1,)):
        broker.get_actor("ear").send(*wrong)
    nudger.deliver_here("ear", errand)
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    wait_for("the nudge", lambda: asked == ["task"], 10)
    wait_for("all to be acknowledged", lambda: not redis.hlen("tower:ears.msgs"), 10)
    assert heard == [1]
    worker.stop()
    errand.stop()


def test_an_idle_consumer_says_now_and_then_that_it_lives(own_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else dramatiq would give its messages to others; but not each time that there is no message."""
    monkeypatch.setattr("tower.broker._ALIVE_S", 0.4)
    broker = open_broker(Settings(redis_url=own_redis.url()))
    redis = broker.client  # type: ignore[attr-defined]
    listen(broker, [], 1)
    consumer = broker.consume("ears", timeout=20)
    end, said, asked = time.monotonic() + 2, set[float](), 0
    while time.monotonic() < end:
        assert next(consumer) is None
        said.update(at for _, at in redis.zrange("tower:__heartbeats__", 0, -1, withscores=True))
        asked += 1
    assert 3 <= len(said) <= 6
    assert asked > 2 * len(said)


@pytest.mark.slow
def test_a_broker_that_is_down_raises_nothing_and_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One line in the log; further nudges are not even tried for a moment."""
    broker = open_broker(Settings(redis_url=f"redis://127.0.0.1:{free_port()}/0"))
    listen(broker, [], 1)
    nudger = Nudger(broker)
    began = time.monotonic()
    assert [nudger.send("ear", "x") for _ in range(50)] == [False] * 50
    assert time.monotonic() - began < 2
    assert nudger.ping() is not None
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


@pytest.mark.slow
def test_a_broker_that_hangs_delays_a_request_by_seconds_at_most(own_redis: Redis) -> None:
    """Its answer is not waited for without end."""
    broker = open_broker(Settings(redis_url=own_redis.url()))
    listen(broker, [], 1)
    own_redis.send(signal.SIGSTOP)
    began = time.monotonic()
    assert Nudger(broker).send("ear", "x") is False
    assert time.monotonic() - began < 4
    own_redis.send(signal.SIGCONT)


@pytest.mark.parametrize("broken", [("maxmemory", "1"), ("min-replicas-to-write", "3")], ids=["full", "read-only"])
def test_a_broker_that_takes_nothing_is_found_out_although_it_answers(own_redis: Redis, broken: tuple[str, str]) -> None:
    """Full, or without the replicas it needs: nothing raises, and readiness sees it as well as its end."""
    broker = open_broker(Settings(redis_url=own_redis.url()))
    listen(broker, [], 1)
    nudger = Nudger(broker)
    assert nudger.ping() is None
    broker.client.config_set(*broken)  # type: ignore[attr-defined]
    assert nudger.ping() is not None
    assert Nudger(broker).send("ear", "x") is False
    broker.client.config_set(broken[0], "0")  # type: ignore[attr-defined]
    assert nudger.ping() is None
    assert Nudger(broker).send("ear", "x") is True


def test_a_broker_that_was_wiped_is_another_one(own_redis: Redis) -> None:
    """So its messages are known to be gone."""
    broker = open_broker(Settings(redis_url=own_redis.url()))
    nudger = Nudger(broker)
    before = nudger.epoch()
    assert before is not None
    assert nudger.epoch() == before
    broker.client.flushall()  # type: ignore[attr-defined]
    assert nudger.epoch() not in (None, before)


def test_the_embedded_broker_forgets_nothing_that_counts() -> None:
    """It dies with everything else."""
    nudger = Nudger(open_broker(Settings(redis_url=None)))
    assert (nudger.epoch(), nudger.ping()) == (None, None)


@pytest.mark.slow
def test_a_broker_that_comes_back_is_used_again(own_redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """And the log says so."""
    caplog.set_level(logging.INFO, "tower.broker")
    broker = open_broker(Settings(redis_url=own_redis.url()))
    heard: list[str] = []
    done = listen(broker, heard, 1)
    worker = dramatiq.Worker(broker, worker_threads=1)
    worker.start()
    nudger = Nudger(broker)
    own_redis.stop(signal.SIGKILL)
    assert nudger.send("ear", "lost") is False
    own_redis.start()
    deadline = time.monotonic() + 20
    while not done.is_set() and time.monotonic() < deadline:
        nudger.send("ear", "again")
        done.wait(0.2)
    worker.stop()
    assert "again" in heard
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == ["the broker takes messages again"]


def test_messages_that_fail_leave_nothing_in_memory() -> None:
    """The embedded broker would keep them for ever."""
    broker = open_broker(Settings(redis_url=None))
    letters = broker.dead_letters_by_queue["x"]  # type: ignore[attr-defined]
    letters.extend(range(1000))
    assert len(letters) == 100
