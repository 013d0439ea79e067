"""Whether a task's folder says what its rows say."""

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path

from tower import db, queries, trace
from tower.folder import Folder, TaskFolder, open_folder
from tower.fsck.findings import Finding
from tower.fsck.rows import Case
from tower.terms import FINAL
from tower.trace import ARTIFACTS, EVENTS, INPUT, LOG, OUTPUT

#: A folder that lags behind for so many seconds is not being written.
LATE_S = 600.0

_IN_THE_WAY = (errno.ELOOP, errno.ENOTDIR)


def check(root: Path, case: Case, now: float) -> Iterator[Finding]:
    """Yield where a task's folder differs from its rows; raise BlockingIOError while somebody writes it."""
    row = case.row
    if row["traced_seq"] > row["seq"]:
        yield Finding("trace_ahead", row["id"], f"{row['traced_seq']} beyond {row['seq']}")
    if row["traced_seq"] < row["seq"] and now - row["updated_at"] > LATE_S:
        yield Finding("trace_late", row["id"], row["trace_error"] or "")
    if row["traced_seq"] == 0:
        return
    try:
        with open_folder(root, row["id"], make=False) as folder:
            yield from _check_inside(folder, case)
    except FileNotFoundError:
        yield Finding("no_folder", row["id"])
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        yield Finding("in_the_way", row["id"], error.strerror or "")


def _check_inside(folder: TaskFolder, case: Case) -> Iterator[Finding]:
    row = case.row
    barred = [name for name in _expected(case) if folder.is_barred(name)]
    if barred:
        yield Finding("in_the_way", row["id"], barred[0])
        return
    for name in folder.names():
        if name.startswith(".") and name.endswith(".new"):
            yield Finding("leftover", row["id"], name)
    if row["status"] not in FINAL and folder.has(OUTPUT):
        yield Finding("early_output", row["id"])
    if row["traced_seq"] == row["seq"]:
        yield from _check_files(folder, case)
    elif (folder.size(LOG) or 0) < row["traced_bytes"]:
        yield Finding("trace_ahead", row["id"], f"{LOG} is shorter than {row['traced_bytes']} bytes")


def _check_files(folder: Folder, case: Case) -> Iterator[Finding]:
    for name, pieces in _contents(case):
        if folder.size(name) is None:
            yield Finding("file_missing", case.row["id"], name)
        elif not _equals(folder.read(name), pieces):
            yield Finding("file_differs", case.row["id"], name)
    if case.row["status"] in FINAL:
        yield from _check_artifacts(folder, case.row["id"])


def _expected(case: Case) -> tuple[str, ...]:
    return (INPUT, LOG, EVENTS, OUTPUT) if case.row["status"] in FINAL else (INPUT, LOG, EVENTS)


def _contents(case: Case) -> Iterator[tuple[str, Iterable[bytes]]]:
    row, events = case.row, [event for event in case.events if event["seq"] <= case.row["seq"]]
    yield INPUT, [trace.render_input(row).encode()]
    yield LOG, trace.log_pieces(row, 0) if case.chunks else [trace.render_log(events).encode()]
    yield EVENTS, [trace.render_events(events).encode()]
    if row["status"] in FINAL:
        yield OUTPUT, [trace.render_output(row, events).encode()]


def _check_artifacts(folder: Folder, task_id: str) -> Iterator[Finding]:
    for name, size in db.read(lambda: queries.artifact_sizes(task_id)):
        path = f"{ARTIFACTS}/{name}"
        if folder.is_barred(path):
            yield Finding("in_the_way", task_id, path)
            return
        found = folder.size(path)
        if found is None:
            yield Finding("file_missing", task_id, path)
        elif found != size:
            yield Finding("file_differs", task_id, f"{path} has {found} bytes, not {size}")


def _equals(found: Iterable[bytes], wanted: Iterable[bytes]) -> bool:
    """Whether two streams of bytes are the same, however they are cut."""
    ours, theirs = iter(wanted), iter(found)
    one, other = b"", b""
    while True:
        one = one or next(filter(None, ours), b"")
        other = other or next(filter(None, theirs), b"")
        length = min(len(one), len(other))
        if not length:
            return not one and not other
        if one[:length] != other[:length]:
            return False
        one, other = one[length:], other[length:]
