"""Repairs of rows by fixed rules: what was wrong stays, marked `struck`; what is missing is marked `lost`."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from tower import db
from tower.fsck import load, rows
from tower.fsck.findings import Finding
from tower.fsck.rows import MOST, Case
from tower.leases import locked
from tower.models import LOST, STRUCK, Task, TaskEvent, TaskLabel, TaskLog
from tower.terms import QUEUED, SUCCEEDED

#: One mending may show the next difference: an event that was struck leaves an attempt untold.
_ROUNDS = 5


def mend(task_id: str) -> None:
    """Put right what the rows of a task say against each other; inside `db.unit`."""
    locked(Task.id == task_id)
    for _ in range(_ROUNDS):
        found = load.load([task_id])
        differences = list(rows.check(found[0])) if found else []
        if not differences:
            return
        # One kind at a time, in the order of the checks: numbers first, since what is added needs one.
        for finding in [one for one in differences if one.code == differences[0].code]:
            _MENDS[finding.code](found[0], finding)


def _add_first(case: Case, finding: Finding) -> None:
    first = replace(finding, seq=1)
    if 1 in case.chunks:
        _strike_chunk(case, first)
    elif any(event["seq"] == 1 for event in case.events):
        _strike(case, first)
    else:
        _insert(case, 1, 0, case.row["created_at"], QUEUED, {})


def _mark_gaps(case: Case, _: Finding) -> None:
    for seq in islice(case.missing(), MOST):
        before = next((event for event in reversed(case.events) if event["seq"] < seq), None)
        attempt, at = (before["attempt"], before["at"]) if before else (0, case.row["created_at"])
        _insert(case, seq, attempt, at, LOST, {"by": "fsck"})


def _raise_seq(case: Case, _: Finding) -> None:
    Task.update(seq=case.last()).where(Task.id == case.row["id"], Task.seq < case.last()).execute()


def _add_end(case: Case, _: Finding) -> None:
    row = case.row
    at = row["finished_at"] if row["finished_at"] is not None else row["updated_at"]
    error = json.loads(row["error"]) if row["error"] and row["status"] != SUCCEEDED else {}
    _append(case, row["attempt"], at, row["status"], {name: error[name] for name in ("code", "message") if name in error})


def _add_attempts(case: Case, _: Finding) -> None:
    for attempt in islice(case.untold_attempts(), MOST):
        _append(case, attempt, case.row["updated_at"], LOST, {"by": "fsck", "kind": "started"})


def _strike(case: Case, finding: Finding) -> None:
    event = next(event for event in case.events if event["seq"] == finding.seq)
    data = {"by": "fsck", "kind": event["kind"], "data": json.loads(event["data"])}
    TaskEvent.update(kind=STRUCK, data=_json(data)).where(TaskEvent.task_id == case.row["id"], TaskEvent.seq == finding.seq).execute()


def _strike_chunk(case: Case, finding: Finding) -> None:
    where = (TaskLog.task_id == case.row["id"], TaskLog.seq == finding.seq)
    text = TaskLog.select(TaskLog.text).where(*where).scalar()
    TaskLog.delete().where(*where).execute()
    _insert(case, finding.seq, case.row["attempt"], case.row["updated_at"], STRUCK, {"by": "fsck", "text": text})


def _write_labels(case: Case, _: Finding) -> None:
    task_id = case.row["id"]
    TaskLabel.delete().where(TaskLabel.task_id == task_id).execute()
    for key, value in json.loads(case.row["labels"]).items():
        TaskLabel.insert(task_id=task_id, key=key, value=value).execute()


_MENDS: dict[str, Callable[[Case, Finding], None]] = {
    "no_first_event": _add_first,
    "seq_gap": _mark_gaps,
    "seq_beyond": _raise_seq,
    "no_end": _add_end,
    "wrong_end": _strike,
    "after_end": _strike,
    "attempt_untold": _add_attempts,
    "attempt_twice": _strike,
    "stray_chunk": _strike_chunk,
    "labels_differ": _write_labels,
}


def _append(case: Case, attempt: int, at: float, kind: str, data: dict[str, Any]) -> None:
    case.row["seq"] = seq = max(case.row["seq"], case.last()) + 1
    Task.update(seq=seq, trace_due_at=db.now()).where(Task.id == case.row["id"]).execute()
    _insert(case, seq, attempt, at, kind, data)


def _insert(case: Case, seq: int, attempt: int, at: float, kind: str, data: dict[str, Any]) -> None:
    TaskEvent.insert(task_id=case.row["id"], seq=seq, attempt=attempt, at=at, kind=kind, data=_json(data)).execute()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
