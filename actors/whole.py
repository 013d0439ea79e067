"""Makes the folders of tasks that have ended and have none yet, as most do, each whole and at once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tower import queries, trace
from tower.faults import fault
from tower.folder import Top
from tower.queries import Told
from tower.terms import FINAL
from tower.trace import EVENTS, INPUT, LOG, OUTPUT

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    """Up to which number of its task's a folder tells everything, how long its log is, and what its task was when it was written."""

    seq: int
    log_size: int
    #: When the task ended, None if it goes on.
    ended_at: float | None
    #: What had been wrong with the folder before.
    trace_error: str | None


def mark(task: dict[str, Any], log_size: int) -> Mark:
    """Return the mark of a folder that tells everything of this row."""
    return Mark(task["seq"], log_size, task["finished_at"] if task["status"] in FINAL else None, task["trace_error"])


def make(root: Path, ids: Sequence[str]) -> dict[str, Mark]:
    """Make folders in TRACE_DIR; return the marks of those that were made, by task. All others go another way."""
    made = {}
    try:
        with Top(root) as top:
            for task_id, told in queries.to_trace([task_id for task_id in ids if top.is_free(task_id)]).items():
                fault("trace.before_write")
                if (files := _files(told)) and top.make(task_id, files):
                    made[task_id] = mark(told["task"], len(dict(files)[LOG]))
    except OSError as error:  # told by the way that all other folders go
        _log.debug("%s: %s", root, error)
    return made


def _files(told: Told) -> list[tuple[str, bytes]] | None:
    """Return the files of a folder; None if its task goes on, or left files or a log to be read piece by piece."""
    task, events = told["task"], told["events"]
    if task["status"] not in FINAL or task["traced_seq"] or told["news"] is None or told["artifacts"]:
        return None
    return [
        (INPUT, trace.render_input(task).encode()),
        (LOG, trace.render_log(told["news"]).encode()),
        (EVENTS, trace.render_events(events).encode()),
        (OUTPUT, trace.render_output(task, events).encode()),
    ]
