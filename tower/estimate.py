"""When a waiting task will start: the decision itself, played forward over the tasks that run and those before it."""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from tower.decision import Load, Obstacle, Row, choose, obstacle

#: Steps played at most; whatever is not decided by then is too far away to tell.
_MOST_STEPS = 5000
#: A task that has run longer than tasks of its type usually do is taken to end after this part of the usual time.
_A_BIT = 0.1


@dataclass(frozen=True)
class Forecast:
    """When a task starts if nothing new comes; None with what holds it up then, as far as one can see."""

    at: float | None
    held_by: Obstacle | None = None


def play(own: Row, ahead: Iterable[Row], running: Sequence[Row], load: Load, typical_s: Mapping[str, float]) -> Forecast:
    """Start and end tasks by the decision until `own` starts.

    `ahead` are those before it, in order, and `running` those that hold a slot, which the load counts already. A type that `typical_s`
    does not know never ends, so what waits for one of its tasks has no forecast.
    """
    load, waiting = load.copy(), [*ahead, own]
    number, ends = count(), list[tuple[float, int, Row]]()
    for row in running:
        heapq.heappush(ends, (load.now + _remaining_s(row, load.now, typical_s), next(number), row))
    for _ in range(_MOST_STEPS):
        chosen, load = choose(waiting, load)
        if own["id"] in chosen:
            return Forecast(load.now)
        for row in waiting if chosen else ():
            if row["id"] in chosen:
                heapq.heappush(ends, (load.now + typical_s.get(row["type"], math.inf), next(number), row))
        waiting = [row for row in waiting if row["id"] not in chosen] if chosen else waiting
        load.now = min(_next_by_clock(waiting, load), ends[0][0] if ends else math.inf)
        if load.now == math.inf:
            break
        while ends and ends[0][0] <= load.now:
            load.remove(heapq.heappop(ends)[2])
    return Forecast(None, obstacle(own, load))


def _remaining_s(row: Row, now: float, typical_s: Mapping[str, float]) -> float:
    usual = typical_s.get(row["type"], math.inf)
    return usual if usual == math.inf else max(usual - (now - row["started_at"]), usual * _A_BIT)


def _next_by_clock(waiting: Iterable[Row], load: Load) -> float:
    """Return when the clock alone frees the first of these."""
    timed = (row for row in waiting if row["rate_key"] is not None or row["ready_at"] > load.now)
    return min((found.until for row in timed if (found := obstacle(row, load)) and found.until is not None), default=math.inf)
