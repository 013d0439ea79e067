"""The numbers of a chart, in the units that its SVG is drawn in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tower.overview import Bucket
from tower.terms import FINAL

#: The height of a chart, and the width of each of its buckets, with the gap between two.
HEIGHT, STEP, GAP = 60, 10, 2


@dataclass(frozen=True)
class Bar:
    """One bucket: where it stands, and how high its parts are."""

    x: int
    at: float
    good: float
    bad: float
    good_count: int
    bad_count: int


@dataclass(frozen=True)
class Chart:
    """Bars from left to right, and a line over them."""

    bars: list[Bar]
    #: Points of the line, as an SVG polyline takes them.
    line: str
    most: int
    most_line: float
    total: int
    broken: int

    @property
    def width(self) -> int:
        """The width of the drawing."""
        return len(self.bars) * STEP


def chart(buckets: Sequence[Bucket]) -> Chart:
    """Return the drawing of what ended and how long it had waited."""
    most = max((bucket.ended for bucket in buckets), default=0)
    most_line = max((bucket.waited_s for bucket in buckets), default=0.0)
    scale = HEIGHT / most if most else 0
    bars = [
        Bar(
            x=index * STEP,
            at=bucket.at,
            good=round(bucket.succeeded * scale, 2),
            bad=round(bucket.broken * scale, 2),
            good_count=bucket.succeeded,
            bad_count=bucket.broken,
        )
        for index, bucket in enumerate(buckets)
    ]
    points = [
        f"{index * STEP + STEP / 2:g},{HEIGHT - bucket.waited_s / most_line * HEIGHT:.1f}" if most_line else ""
        for index, bucket in enumerate(buckets)
    ]
    return Chart(
        bars,
        " ".join(filter(None, points)),
        most,
        most_line,
        sum(bar.good_count + bar.bad_count for bar in bars),
        sum(bar.bad_count for bar in bars),
    )


@dataclass(frozen=True)
class Phase:
    """One stretch of a task's life, drawn to scale: per mille of the whole."""

    kind: str
    attempt: int
    start: float
    width: float
    seconds: float
    is_open: bool


def phases(events: Sequence[dict[str, Any]], until: float) -> list[Phase]:
    """Return the stretches of a task's life, from its events in order; the last goes to `until` if it has no end yet."""
    turns = [(event["kind"], event["at"], event["attempt"]) for event in events if event["kind"] in _AFTER]
    if not turns:
        return []
    begin = turns[0][1]
    whole = max(until - begin, 0.001)
    found = []
    for (kind, at, attempt), following in zip(turns, [*turns[1:], None], strict=True):
        then = _AFTER[kind]
        if then is None:
            continue
        end = following[1] if following else until
        start, width = (at - begin) / whole * 1000, (end - at) / whole * 1000
        found.append(Phase(then, attempt, round(start, 2), round(max(width, 2), 2), max(0.0, end - at), following is None))
    return found


#: What a task is in after each event; None once it has ended.
_AFTER: dict[str, str | None] = {
    **dict.fromkeys(("queued", "retry_scheduled", "released", "undelivered", "worker_lost"), "queued"),
    "dispatched": "dispatched",
    "started": "running",
    **dict.fromkeys(FINAL),
}
