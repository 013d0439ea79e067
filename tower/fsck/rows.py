"""Whether the rows of a task agree with each other."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tower.fsck.findings import Finding
from tower.models import LOST, STRUCK
from tower.terms import FINAL, QUEUED

#: Gaps and attempts named, and mended, in one run; a row whose number is nonsense would have millions.
MOST = 1000
_NAMED = 5


@dataclass
class Case:
    """Everything about one task that can be compared."""

    row: dict[str, Any]
    events: list[dict[str, Any]]
    #: seq -> attempt of each log chunk.
    chunks: dict[int, int]
    labels: dict[str, str]

    @property
    def has_ended(self) -> bool:
        """Whether the row is final."""
        return self.row["status"] in FINAL

    def told(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events that tell of the task, of one kind if asked; not those that a repair wrote."""
        return [event for event in self.events if event["kind"] not in (LOST, STRUCK) and kind in (None, event["kind"])]

    def missing(self) -> Iterator[int]:
        """Yield the numbers that no event and no chunk has."""
        known = {event["seq"] for event in self.events} | self.chunks.keys()
        return (seq for seq in range(1, self.row["seq"] + 1) if seq not in known)

    def untold_attempts(self) -> Iterator[int]:
        """Yield the attempts of which nothing tells that they began."""
        told = {event["attempt"] for event in self.events if event["kind"] in ("started", LOST)}
        return (attempt for attempt in range(1, self.row["attempt"] + 1) if attempt not in told)

    def last(self) -> int:
        """Return the highest number of an event or chunk."""
        numbers: list[int] = [0, *self.chunks, *(event["seq"] for event in self.events)]
        return max(numbers)


def check(case: Case) -> Iterator[Finding]:
    """Yield where the rows of a task contradict each other."""
    yield from _check_numbers(case)
    yield from _check_end(case)
    yield from _check_attempts(case)
    if case.labels != json.loads(case.row["labels"]):
        yield Finding("labels_differ", case.row["id"])


def _check_numbers(case: Case) -> Iterator[Finding]:
    task_id = case.row["id"]
    if not any(event["seq"] == 1 and event["kind"] in (QUEUED, LOST, STRUCK) for event in case.events):
        yield Finding("no_first_event", task_id)
    gaps = list(islice((seq for seq in case.missing() if seq > 1), MOST))
    if gaps:
        yield Finding("seq_gap", task_id, _listed(gaps))
    if case.last() > case.row["seq"]:
        yield Finding("seq_beyond", task_id, f"{case.last()} beyond {case.row['seq']}")


def _check_end(case: Case) -> Iterator[Finding]:
    task_id, told = case.row["id"], case.told()
    ends = [event for event in told if event["kind"] in FINAL]
    right = next((event for event in ends if event["kind"] == case.row["status"]), None)
    if case.has_ended and right is None:
        yield Finding("no_end", task_id, case.row["status"])
    for event in told:
        if event in ends and event is not right:
            yield Finding("wrong_end", task_id, f"{event['kind']} at number {event['seq']}", event["seq"])
        elif right and event["seq"] > right["seq"]:
            yield Finding("after_end", task_id, f"{event['kind']} at number {event['seq']}", event["seq"])


def _check_attempts(case: Case) -> Iterator[Finding]:
    task_id, begun = case.row["id"], set[int]()
    for event in case.told("started"):
        if event["attempt"] in begun or event["attempt"] > case.row["attempt"]:
            yield Finding("attempt_twice", task_id, f"attempt {event['attempt']} at number {event['seq']}", event["seq"])
        begun.add(event["attempt"])
    untold = list(islice(case.untold_attempts(), MOST))
    if untold:
        yield Finding("attempt_untold", task_id, _listed(untold))
    for seq, attempt in case.chunks.items():
        if not 1 <= attempt <= case.row["attempt"]:
            yield Finding("stray_chunk", task_id, f"attempt {attempt} at number {seq}", seq)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NAMED]))
    return shown if len(numbers) <= _NAMED else f"{shown} and {len(numbers) - _NAMED} more"
