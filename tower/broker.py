"""REDIS_URL to dramatiq broker, and `send`: the one place that knows which broker it is, and that it may be gone."""

import json
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Queue
from typing import Any

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker, _RedisConsumer
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ActorNotFound, ConnectionClosed
from redis.backoff import NoBackoff
from redis.retry import Retry

from tower.errands import Errand
from tower.errors import Unavailable
from tower.log import Outage
from tower.settings import Settings

#: Actors that every tower has; a handler's actor is named after its type.
ORCHESTRATE, TRACE = "tower.orchestrate", "tower.trace"
#: What the names of handler actors begin with.
HANDLER = "handler."

_NAMESPACE = "tower"
#: How dramatiq names the hash that holds the messages of a queue, and the queue of those that failed.
_MESSAGES, _DEAD = ".msgs", ".XQ"

#: For how long a broker that failed is not asked again, and how long it may take to answer: a request waits no longer for it.
_PAUSE_S = 2.0
_SOCKET_S = 1.0
#: How long a consumer waits inside Redis for a message at most, before it looks whether it should end.
_WAIT_S = 1.0
#: Seconds between two nudges of which each says the same, and under load, when whoever works asks for passes by himself.
_PACE_S, _LOADED_S = 0.02, 0.04
#: How long a consumer waits whose worker has no room; a slot that becomes free goes on with the next task at once.
_FULL_S = 0.02
#: How often a consumer says that it lives; dramatiq gives its messages to others after a minute of silence.
_ALIVE_S = 5.0
#: A key that is gone when the messages are.
_EPOCH = "tower:epoch"
_AWAY = "the broker takes no messages, tasks are found in the database until it does: %s"

_log = logging.getLogger(__name__)


def handler_actor(type_name: str) -> str:
    """Return the name of the actor that runs tasks of a type."""
    return f"{HANDLER}{type_name}"


def open_broker(settings: Settings) -> dramatiq.Broker:
    """Make the broker of the settings, without any of dramatiq's own retries, limits or results."""
    if settings.redis_url is None:
        broker: dramatiq.Broker = _EmbeddedBroker()
    else:
        # One try and short limits: a message is only a nudge, so no request waits long for a broker that is down.
        broker = _WakingRedisBroker(
            client=_client(settings.redis_url),
            waiting=_client(settings.redis_url, _WAIT_S + _SOCKET_S),
            namespace=_NAMESPACE,
            middleware=[],
            dead_message_ttl=3_600_000,
        )
    dramatiq.set_broker(broker)
    return broker


def _client(url: str, socket_s: float = _SOCKET_S) -> redis.Redis:
    limits = {"socket_connect_timeout": 1, "socket_timeout": socket_s, "health_check_interval": 15}
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **limits)


def _outage() -> Outage:
    return Outage(_log, "the broker takes messages again")


class _EmbeddedBroker(StubBroker):
    """dramatiq's in-process broker; it keeps no unbounded memory of messages that failed."""

    def __init__(self) -> None:
        super().__init__(middleware=[])
        self.dead_letters_by_queue = _Bounded()  # type: ignore[assignment]

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue, and no second one for delayed messages: nothing here is ever delayed."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues[queue_name] = Queue()
            self.emit_after("declare_queue", queue_name)


class _Bounded(dict[str, Any]):
    def __missing__(self, queue: str) -> Any:
        self[queue] = deque(maxlen=100)
        return self[queue]


class _WakingConsumer(_RedisConsumer):
    """Waits for a message inside Redis instead of sleeping ever longer between two looks, and waits for Redis itself.

    BLMOVE from a list's head to its own head blocks until there is a message and changes nothing.
    """

    #: When dramatiq's own statement is due again though there is no message: it tells others that this consumer lives.
    _asks_at = 0.0

    def __next__(self) -> Any:
        has_room = self.broker.room.get(self.queue_name)
        most = min(self.prefetch - self.outstanding_message_count, 1 if has_room else self.prefetch)
        if not self.message_cache and (most <= 0 or (has_room and not has_room())):
            time.sleep(_FULL_S)
            return None
        if not self.message_cache:
            key = f"{self.broker.namespace}:{self.queue_name}"
            try:
                found = self.broker.waiting.blmove(key, key, min(self.timeout / 1000, _WAIT_S), "LEFT", "LEFT")
                if not found and time.monotonic() < self._asks_at:
                    return None
                if has_room and not has_room():
                    return None  # it filled up meanwhile, so the message is for somebody else
                self._asks_at = time.monotonic() + _ALIVE_S
                self.message_cache = self.broker.do_fetch(self.queue_name, most)
            except redis.RedisError as error:
                # Away, hung, full or read-only. dramatiq would shout every three seconds and start anew; the client connects by itself.
                self.broker.outage.begin(_AWAY, error)
                time.sleep(_PAUSE_S / 2)
                return None
            if not self.message_cache:
                return None
        return self._given_here(super().__next__())  # type: ignore[no-untyped-call]

    def _given_here(self, message: Any) -> Any:
        """Give a nudge to the thread here that answers it, to which those of dramatiq would only pass it on; return every other one."""
        errand = self.broker.errands.get(message.actor_name) if message else None
        if errand is None or not (len(message.args) == 1 and isinstance(message.args[0], str)):
            return message
        errand.ask(message.args[0])
        self.ack(message)
        return None

    # A nudge that stays unacknowledged comes again one day, which is harmless; to insist would hold up the worker's threads.

    def ack(self, message: Any) -> None:
        """Tell Redis that the message is done, if it listens."""
        with suppress(ConnectionClosed, redis.RedisError):
            super().ack(message)  # type: ignore[no-untyped-call]

    def nack(self, message: Any) -> None:
        """Tell Redis that the message failed, if it listens."""
        with suppress(ConnectionClosed, redis.RedisError):
            super().nack(message)  # type: ignore[no-untyped-call]

    def requeue(self, messages: Any) -> None:
        """Give messages back to Redis, if it listens."""
        with suppress(ConnectionClosed, redis.RedisError):
            super().requeue(messages)  # type: ignore[no-untyped-call]


class _WakingRedisBroker(RedisBroker):
    """dramatiq's Redis broker whose consumers are woken by the message itself."""

    consumer_class = _WakingConsumer

    def __init__(self, waiting: redis.Redis, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        #: For commands that wait.
        self.waiting = waiting
        self.outage = _outage()
        #: Queues whose messages are of use only to a process with room for a task, and whether this one has some.
        self.room: dict[str, Callable[[], bool]] = {}
        #: Actors at work in this process, by name.
        self.errands: dict[str, Errand] = {}

    def declare_queue(self, queue_name: str) -> None:
        """Declare a queue, and no second one for delayed messages: nothing here is ever delayed."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues.add(queue_name)
            self.emit_after("declare_queue", queue_name)


def take_while(broker: dramatiq.Broker, queues: Iterable[str], has_room: Callable[[], bool]) -> bool:
    """Leave the messages of some queues to other processes while there is no room here; False if there are none: it is embedded."""
    if not isinstance(broker, _WakingRedisBroker):
        return False
    broker.room.update(dict.fromkeys(queues, has_room))
    return True


class Nudger:
    """Sends nudges, and forgets a broker that is down for a moment: the sweep sends again."""

    def __init__(self, broker: dramatiq.Broker) -> None:
        self._broker = broker
        self._down_until = 0.0
        self._outage: Outage = getattr(broker, "outage", None) or _outage()
        #: Actors at work in this process, by name; and what sends nudges to those of other processes at a pace.
        self._errands: dict[str, Errand] = broker.__dict__.setdefault("errands", {})
        self._paced: dict[str, Errand] = broker.__dict__.setdefault("paced", {})

    def send(self, actor_name: str, *task_ids: str) -> bool:
        """Send the ids of tasks to an actor; call it after the commit. Returns False, and raises nothing, if it could not."""
        errand = self._errands.get(actor_name) or self._paced.get(actor_name)
        if errand:
            errand.ask(*task_ids)
            return True
        sent = [self._send(actor_name, task_id) for task_id in task_ids]  # all of them, whatever becomes of the first
        return all(sent)

    def _send(self, actor_name: str, task_id: str) -> bool:
        if time.monotonic() < self._down_until:
            return False
        try:
            self._broker.get_actor(actor_name).send(task_id)
        except ActorNotFound:
            _log.warning("no actor is called %s; is its handler installed here?", actor_name)
            return False
        except Exception as error:  # whatever is wrong with the broker, the row is the truth
            self._fail(error)
            return False
        self._outage.end()
        return True

    def deliver_here(self, actor_name: str, errand: Errand | None) -> None:
        """Give nudges for an actor to a thread of this process, whoever sends them here; None ends that."""
        if errand:
            self._errands[actor_name] = errand
        else:
            self._errands.pop(actor_name, None)

    def pace(self, actor_name: str) -> Errand | None:
        """Pace the nudges for an actor of other processes, until `end_pace`: one speaks for those before it.

        Returns what sends them; None if they are answered here, or paced already.
        """
        if actor_name in self._errands or actor_name in self._paced:
            return None
        errand = Errand(actor_name, lambda asked: self._send(actor_name, asked[-1]), _PACE_S, loaded_s=_LOADED_S)
        errand.start()
        self._paced[actor_name] = errand
        return errand

    def end_pace(self, actor_name: str) -> None:
        """Send nudges for an actor as they come, after those that wait."""
        errand = self._paced.pop(actor_name, None)
        if errand:
            errand.stop()

    def ping(self) -> str | None:
        """Return None if the broker takes messages, else what is wrong."""
        try:
            self._ask_epoch()
        except redis.RedisError as error:
            self._fail(error)
            return str(error) or type(error).__name__
        return None

    def epoch(self) -> str | None:
        """Return what changes when the broker forgets its messages; None if it cannot be asked, or has nothing to forget."""
        if time.monotonic() < self._down_until:
            return None
        try:
            return self._ask_epoch()
        except redis.RedisError as error:
            self._fail(error)
            return None

    def _ask_epoch(self) -> str | None:
        """Write as sending does: a broker that is full or read-only answers a mere PING."""
        client = getattr(self._broker, "client", None)
        if client is None:
            return None
        client.set(_EPOCH, uuid.uuid4().hex, nx=True)
        found: bytes | None = client.get(_EPOCH)
        self._outage.end()
        return found.decode() if found else None

    def _fail(self, error: Exception) -> None:
        self._down_until = time.monotonic() + _PAUSE_S
        self._outage.begin(_AWAY, error)


@dataclass(frozen=True)
class Letter:
    """A message as it lies in Redis."""

    queue: str
    id: str
    #: What it asks, of whom; None if it cannot be read.
    actor: str | None
    task_id: str | None
    #: Seconds since the epoch, by the clock of whoever sent it.
    sent_at: float
    #: Whether it failed and was put away.
    is_dead: bool


class Mailbox:
    """All messages in Redis, to look at and to drop; raises Unavailable while Redis does not answer."""

    def __init__(self, redis_url: str) -> None:
        self._client = _client(redis_url)

    def letters(self) -> Iterator[Letter]:
        """Yield every message; one that comes or goes meanwhile may be among them or not."""
        with _answering():
            for key in self._client.scan_iter(f"{_NAMESPACE}:*{_MESSAGES}", _type="hash"):
                queue = key.decode(errors="replace").removeprefix(f"{_NAMESPACE}:").removesuffix(_MESSAGES)
                for message_id, data in self._client.hscan_iter(key):
                    yield _letter(queue, message_id.decode(errors="replace"), data)

    def drop(self, letter: Letter) -> None:
        """Remove a message, wherever it waits."""
        key = f"{_NAMESPACE}:{letter.queue}"
        with _answering(), self._client.pipeline(transaction=True) as pipe:
            if letter.is_dead:
                pipe.zrem(key, letter.id)
            else:
                pipe.lrem(key, 0, letter.id)
            pipe.hdel(f"{key}{_MESSAGES}", letter.id)
            pipe.execute()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable(f"Redis does not answer: {error}", code="broker_unavailable") from error


def _letter(queue: str, message_id: str, data: bytes) -> Letter:
    is_dead = queue.endswith(_DEAD)
    try:
        told = json.loads(data)
        (task_id,) = told["args"]
        if isinstance(task_id, str) and task_id.isprintable() and isinstance(told["actor_name"], str):
            return Letter(queue, message_id, told["actor_name"], task_id, float(told["message_timestamp"]) / 1000, is_dead)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return Letter(queue, message_id, None, None, 0.0, is_dead)
