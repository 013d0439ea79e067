"""What goes wrong: one fault after the other, chosen by a seed, each with the moment when it is mended."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

import redis
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker

from tests.chaos.checker import rows
from tests.chaos.stage import Stage, signal_to

#: Seconds between two faults.
_PAUSE = (0.4, 1.6)
_STEPS = (3600, 60, -30, -5)
#: A process is left alone until it is at work, but for this part of the cases.
_EARLY = 0.02


class Nemesis:
    """Breaks a stage."""

    def __init__(self, stage: Stage, seed: int, say: Callable[[str], None]) -> None:
        self._stage, self._say = stage, say
        self._random = random.Random(seed)
        self._repairs: list[tuple[float, str, Callable[[], object]]] = []
        self._away: set[str] = set()
        self._clock = self._latest = 0.0
        self.done: Counter[str] = Counter()
        self.left_out: list[str] = []
        self._kinds = self._known()

    def _known(self) -> list[tuple[int, str, Callable[[], str | None]]]:
        """Return the faults for this stage with their weights."""
        kinds: list[tuple[int, str, Callable[[], str | None]]] = [
            (3, "worker kill -9", lambda: self._kill(self._worker())),
            (2, "worker STOP", lambda: self._freeze(self._worker())),
            (2, "guardian kill -9", lambda: self._kill(self._one(self._stage.guardians()))),
            (1, "server TERM", lambda: self._signal(self._server(), signal.SIGTERM)),
            (1, "clock step", self._step_clock),
        ]
        if self._stage.has_disk:
            kinds.append((1, "full trace disk", self._fill_disk))
        else:
            self.left_out.append("full trace disk (mounting one needs root)")
        if self._stage.is_embedded:
            self.left_out.append("faults of Redis, Postgres and of workers apart from the server (there are none)")
            return kinds
        return [
            *kinds,
            (1, "server kill -9", lambda: self._kill(self._server())),
            (1, "server STOP", lambda: self._freeze(self._server())),
            (1, "worker TERM", lambda: self._signal(self._master(), signal.SIGTERM)),
            (1, "master kill -9", lambda: self._kill(self._master())),
            (1, "Redis FLUSHALL", self._flush),
            (1, "Redis kill -9", self._kill_redis),
            (1, "Redis STOP", self._freeze_redis),
            (1, "Postgres immediate stop", self._stop_postgres),
            (2, "doubled nudges", self._double_nudges),
        ]

    def run(self, seconds: float) -> None:
        """Break something every now and then; afterwards mend it all."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            next_at = min(now + self._random.uniform(*_PAUSE), end)
            self._mend(next_at)
            weights, names, faults = zip(*self._kinds, strict=True)
            chosen = self._random.choices(range(len(names)), weights)[0]
            said = faults[chosen]()
            if said is not None:
                self.done[names[chosen]] += 1
                self._say(f"  {seconds - (end - time.monotonic()):5.1f} s  {names[chosen]} {said}")
        self.mend_all()

    def _mend(self, until: float) -> None:
        """Do the repairs that fall due until then."""
        while True:
            self._repairs.sort(key=lambda repair: repair[0])
            if not self._repairs or self._repairs[0][0] > until:
                time.sleep(max(0.0, until - time.monotonic()))
                return
            at, name, repair = self._repairs.pop(0)
            time.sleep(max(0.0, at - time.monotonic()))
            repair()
            self._away.discard(name)

    def mend_all(self) -> None:
        """Let everything work again; the clock stays where it was furthest, so that everything is due."""
        for _, name, repair in sorted(self._repairs, key=lambda repair: repair[0]):
            repair()
            self._away.discard(name)
        self._repairs.clear()
        self._stage.step_clock(self._latest)

    def _later(self, most: float, name: str, repair: Callable[[], object]) -> str:
        after = self._random.uniform(0.2, most)
        self._away.add(name)
        self._repairs.append((time.monotonic() + after, name, repair))
        return f"for {after:.1f} s"

    def _one(self, pids: list[int]) -> int | None:
        return self._random.choice(sorted(pids)) if pids else None

    def _worker(self) -> int | None:
        return self._one(self._grown(self._stage.workers()))

    def _server(self) -> int | None:
        return self._one(self._grown([self._stage.server.pid]))

    def _grown(self, pids: list[int]) -> list[int]:
        """Leave processes that have hardly begun alone, mostly: one that never gets to its work breaks nothing."""
        return [pid for pid in pids if self._stage.is_at_work(pid) or self._random.random() < _EARLY]

    def _master(self) -> int | None:
        return self._one(self._grown([service.pid for service in self._stage.services[1:]]))

    def _kill(self, pid: int | None) -> str | None:
        if pid is None:
            return None
        self._stage.kill(pid)
        return str(pid)

    def _signal(self, pid: int | None, number: signal.Signals) -> str | None:
        if pid is None:
            return None
        signal_to(pid, number)
        return str(pid)

    def _freeze(self, pid: int | None) -> str | None:
        if pid is None or f"process {pid}" in self._away:
            return None
        signal_to(pid, signal.SIGSTOP)
        return f"{pid} " + self._later(2 * self._stage.lease_s, f"process {pid}", lambda: signal_to(pid, signal.SIGCONT))

    def _step_clock(self) -> str:
        self._clock = self._random.choice(_STEPS)
        self._latest = max(self._latest, self._clock)
        if "postgres" in self._away:
            return ""
        self._stage.step_clock(self._clock)
        return f"to {self._clock:+g} s"

    def _fill_disk(self) -> str | None:
        if "disk" in self._away:
            return None
        self._stage.fill_disk()
        return self._later(4, "disk", self._stage.empty_disk)

    def _flush(self) -> str | None:
        if "redis" in self._away:
            return None
        with redis.Redis.from_url(self._stage.redis.url(), socket_timeout=2) as client:
            client.flushall()
        return ""

    def _kill_redis(self) -> str | None:
        if "redis" in self._away:
            return None
        self._stage.redis.stop(signal.SIGKILL)
        return self._later(3, "redis", self._stage.redis.start)

    def _freeze_redis(self) -> str | None:
        if "redis" in self._away:
            return None
        self._stage.redis.send(signal.SIGSTOP)
        return self._later(4, "redis", lambda: self._stage.redis.send(signal.SIGCONT))

    def _stop_postgres(self) -> str | None:
        if "postgres" in self._away:
            return None
        self._stage.postgres.stop(signal.SIGQUIT)
        return self._later(3, "postgres", self._stage.postgres.start)

    def _double_nudges(self) -> str | None:
        """Send what was sent before, again and in any order, for tasks in any state."""
        if self._away & {"redis", "postgres"}:
            return None
        known = rows(self._stage.database_url, "SELECT id, type, queue FROM task")
        chosen = self._random.sample(known, min(20, len(known)))
        with redis.Redis.from_url(self._stage.redis.url(), socket_timeout=2) as client:
            broker = RedisBroker(client=client, namespace="tower", middleware=[])
            for row in chosen:
                names = [(f"handler.{row['type']}", row["queue"]), ("tower.orchestrate", "orchestrator"), ("tower.trace", "trace")]
                for actor, queue in self._random.sample(names, 3):
                    broker.enqueue(Message(queue_name=queue, actor_name=actor, args=(row["id"],), kwargs={}, options={}))
        return f"×{3 * len(chosen)}"
