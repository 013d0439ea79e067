"""The invariant checker: holds the rows, the folders and the journal of the commands against what the tower promises."""

import json
import sqlite3
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import psycopg2.extras

from tower import trace
from tower.host import MARK
from tower.terms import FINAL

#: What ends an attempt without ending the task.
BACK_TO_QUEUE = ("released", "worker_lost", "retry_scheduled")


@dataclass
class Report:
    """What was found; every list must be empty but `ran_to_end_twice`, which is what at-least-once means."""

    accepted: int = 0
    #: Accepted, but without a row, or not final when the time was over.
    lost: list[str] = field(default_factory=list)
    #: Two runs of one task at the same time.
    overlapping: list[str] = field(default_factory=list)
    #: More than one final event, or one that is not the row's; something after it; attempts that are not 1 to n.
    doubled_results: list[str] = field(default_factory=list)
    #: Processes of tasks that live on.
    orphans: list[str] = field(default_factory=list)
    #: Commands that ran to their end more than once.
    ran_to_end_twice: list[str] = field(default_factory=list)
    #: Tasks with max_attempts=1 that ran again.
    at_most_once_broken: list[str] = field(default_factory=list)
    trace_differences: list[str] = field(default_factory=list)
    #: Seconds from the kill of a worker to the next run of what it ran.
    recoveries: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    unanswered: int = 0
    restarts: int = 0
    drain_s: float = 0.0
    starts: int = 0

    @property
    def broken(self) -> list[str]:
        """Every broken promise, in words."""
        names = ("lost", "overlapping", "doubled_results", "orphans", "at_most_once_broken", "trace_differences")
        return [f"{name}: {text}" for name in names for text in getattr(self, name)]

    def row(self, name: str) -> str:
        """Return the row of a table; see COLUMNS."""
        p50 = f"{statistics.median(self.recoveries):.1f} / {max(self.recoveries):.1f} s" if self.recoveries else "–"
        cells = [name, self.accepted, self.starts, len(self.lost), len(self.overlapping), len(self.doubled_results), len(self.orphans)]
        cells += [len(self.at_most_once_broken), len(self.trace_differences), len(self.ran_to_end_twice), p50, self.refused]
        cells += [self.unanswered, self.restarts, f"{self.drain_s:.1f} s"]
        return "| " + " | ".join(map(str, cells)) + " |"


COLUMNS = (
    "| run | accepted | starts | lost | overlapping | doubled results | orphans | at most once broken | trace differences "
    "| ran to their end twice | recovery p50 / max | POSTs refused | not answered | restarts | drain |"
)
HEADER = COLUMNS + "\n" + "|---" * (COLUMNS.count("|") - 1) + "|"


def rows(url: str, statement: str) -> list[dict[str, Any]]:
    """Return what a SELECT finds, by a connection of our own."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(f"file:{url.removeprefix('sqlite:///')}?mode=ro", uri=True, timeout=20)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(statement)]
    with closing(psycopg2.connect(url)) as connection, connection.cursor(cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
        cursor.execute(statement)
        return [dict(row) for row in cursor.fetchall()]


def arrived(url: str) -> list[str]:
    """Return the tasks that were accepted and are no rows of `task` yet; who looks there after that misses none on its way."""
    return [row["id"] for row in rows(url, "SELECT id FROM task_arrived")]


def unfinished(url: str) -> list[str]:
    """Return the tasks that are not final and traced yet."""
    waiting = arrived(url)
    return waiting + [row["id"] for row in rows(url, "SELECT id, status, seq, traced_seq FROM task") if not trace.is_complete(row)]


def check(
    url: str,
    traces: Path,
    *,
    accepted: Collection[str] | None = None,
    journal: Path | None = None,
    marks: Mapping[str, str] | None = None,
    kills: Mapping[int, float] | None = None,
) -> Report:
    """Compare everything. `accepted` are the ids of answered POSTs, all rows if None; `marks` restricts the search for orphans to
    processes with these in their environment; `kills` says when (CLOCK_BOOTTIME) which worker was killed."""
    found = {row["id"]: row for row in rows(url, "SELECT * FROM task")}
    told = _Told(url)
    report = Report(accepted=len(found) if accepted is None else len(accepted))
    report.lost += [f"{task_id} has no row" for task_id in accepted or () if task_id not in found]
    for task_id, task in found.items():
        _check_task(report, task, told.events[task_id])
        report.trace_differences += [f"{task_id}: {text}" for text in _trace_differences(traces / task_id, task, told)]
    report.trace_differences += [f"{path.name} is a folder without a row" for path in _folders(traces) if path.name not in found]
    _check_journal(report, journal, found, kills or {})
    report.orphans += [f"{task_id}: process {pid} lives on: {line}" for pid, task_id, line in orphans(marks or {}, found)]
    return report


class _Told:
    """What the rows beside the tasks tell, by task."""

    def __init__(self, url: str) -> None:
        self.events, self.logs, self.artifacts = (
            _by_task(rows(url, f"SELECT * FROM {table} ORDER BY task_id, {order}"))
            for table, order in (("task_event", "seq"), ("task_log", "seq"), ("task_artifact", "name, part"))
        )


def _by_task(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        grouped[row["task_id"]].append(row)
    return grouped


def _check_task(report: Report, task: dict[str, Any], events: list[dict[str, Any]]) -> None:
    task_id, status = task["id"], task["status"]
    kinds = [event["kind"] for event in events]
    starts = [event["attempt"] for event in events if event["kind"] == "started"]
    report.statuses[status] += 1
    report.starts += len(starts)
    if status not in FINAL:
        report.lost.append(f"{task_id} is {status} still: {kinds}")
    ends = [kind for kind in kinds if kind in FINAL]
    if ends != ([status] if status in FINAL else []) or (ends and kinds[-1] != status):
        report.doubled_results.append(f"{task_id} is {status}, its events are {kinds}")
    if starts != list(range(1, task["attempt"] + 1)):
        report.doubled_results.append(f"{task_id}: attempts {starts} are not 1 to {task['attempt']}")
    between = [kind for kind in kinds if kind in ("started", *BACK_TO_QUEUE, *FINAL)]
    if any(before == after == "started" for before, after in pairwise(between)):
        report.overlapping.append(f"{task_id}: an attempt began before the one before ended: {kinds}")
    # What may run once is released only if its handler had not been called; the journal knows of its runs.
    if task["max_losses"] == 1 and len(starts) - kinds.count("released") > 1:
        report.at_most_once_broken.append(f"{task_id} was started {len(starts)} times: {kinds}")
    seqs = [event["seq"] for event in events]
    if seqs != sorted(set(seqs)) or (seqs and seqs[-1] > task["seq"]):
        report.doubled_results.append(f"{task_id}: its events are numbered {seqs}, the row says {task['seq']}")


def _trace_differences(folder: Path, task: dict[str, Any], told: _Told) -> Iterator[str]:
    """Yield where the folder of a final task does not say what the rows say."""
    if task["status"] not in FINAL:
        return
    if task["traced_seq"] < task["seq"]:
        yield f"traced up to {task['traced_seq']} of {task['seq']}, {task['trace_error'] or 'no error'}"
        return
    events, logs = told.events[task["id"]], told.logs[task["id"]]
    expected = {
        trace.INPUT: trace.render_input(task),
        trace.OUTPUT: trace.render_output(task, events),
        trace.EVENTS: trace.render_events(events),
    }
    if len(events) + len(logs) == task["seq"]:  # chunks may have been deleted once they were traced
        expected[trace.LOG] = trace.render_log(sorted(events + logs, key=lambda entry: entry["seq"]))
    for name, text in expected.items():
        try:
            if (folder / name).read_text() != text:
                yield f"{name} differs from the rows"
        except (OSError, UnicodeDecodeError) as error:
            yield f"{name} cannot be read: {error}"
    for name, parts in _parts(told.artifacts[task["id"]]).items():
        path = folder / trace.ARTIFACTS / name
        if not path.is_file() or path.read_bytes() != parts:
            yield f"artifacts/{name} differs from the rows"
    yield from (f"{path.name} was left half written" for path in folder.glob(".*.new") if task["trace_error"] is None)


def _parts(found: list[dict[str, Any]]) -> dict[str, bytes]:
    whole: dict[str, bytes] = defaultdict(bytes)
    for row in found:
        whole[row["name"]] += bytes(row["data"])
    return whole


def _folders(traces: Path) -> list[Path]:
    return [path for path in traces.iterdir() if path.is_dir() and not path.name.startswith(".")] if traces.is_dir() else []


def read_journal(folder: Path, task_id: str) -> list[dict[str, Any]]:
    """Return what the runs of a task's command wrote."""
    path = folder / task_id
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _check_journal(report: Report, folder: Path | None, found: Mapping[str, Any], kills: Mapping[int, float]) -> None:
    for task_id, task in found.items() if folder else ():
        lines = read_journal(folder, task_id) if folder else []
        starts = [line for line in lines if line["what"] == "start"]
        seen = Counter(line["attempt"] for line in starts)
        report.overlapping += [f"{task_id}: run {line['attempt']} met {line['other']}" for line in lines if line["what"] == "overlap"]
        report.doubled_results += [f"{task_id}: attempt {number} ran {count} times" for number, count in seen.items() if count > 1]
        if sum(line["what"] == "end" for line in lines) > 1:
            report.ran_to_end_twice.append(task_id)
        if task["max_losses"] == 1 and len(starts) > 1:
            report.at_most_once_broken.append(f"{task_id}: its command ran {len(starts)} times")
        for run, following in pairwise(starts):
            killed = kills.get(run["parent"])
            if killed is not None and run["at"] <= killed <= following["at"]:
                report.recoveries.append(following["at"] - killed)


def orphans(marks: Mapping[str, str], found: Collection[str]) -> Iterator[tuple[int, str, str]]:
    """Yield the live processes that carry the mark of one of these tasks."""
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            task_id = environment.get(MARK, "").partition(":")[0]
            if task_id in found and marks.items() <= environment.items() and process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, task_id, " ".join(process.cmdline())
        except psutil.Error:
            continue
