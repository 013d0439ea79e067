"""The walk through everything: tasks page by page, then folders without a task, then leases, then messages."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from uuid import UUID

from tower import db
from tower.errors import TowerError
from tower.folder import set_aside
from tower.fsck import folders, load, repair, rows
from tower.fsck.findings import Finding, Result
from tower.fsck.leases import Leases
from tower.fsck.messages import check_messages
from tower.fsck.rows import Case
from tower.models import Task
from tower.retention import is_past
from tower.settings import Settings

#: Writes a task's folder again from its rows: only the trace actor's code can.
Rebuild = Callable[[str], None]

#: A folder this young may belong to a task that is just being made or deleted.
_YOUNG_S = 600.0
_PAGE = 500


def run(settings: Settings, rebuild: Rebuild | None = None) -> Iterator[Result]:
    """Yield every difference, repaired where that is possible if `rebuild` is given; nothing is changed otherwise."""
    leases = Leases(settings)
    yield from _check_tasks(settings, rebuild)
    yield from _check_orphans(settings.trace_dir, repairs=rebuild is not None)
    yield from leases.check()
    yield from check_messages(settings, repairs=rebuild is not None)


def _check_tasks(settings: Settings, rebuild: Rebuild | None) -> Iterator[Result]:
    root = settings.trace_dir
    for suspect in load.cases():
        if not _differences(root, suspect) or is_past(suspect.row, settings, db.read(db.clock)):
            continue
        task_id = suspect.row["id"]
        found = _look_again(root, task_id)  # a task goes on while we look: only what two looks saw is a difference
        if found and rebuild:
            _repair(root, task_id, found, rebuild)
            left = {one.code for one in _look_again(root, task_id)}
        else:
            left = {one.code for one in found}
        yield from (Result(one, is_repaired=one.code not in left) for one in found)


def _look_again(root: Path, task_id: str) -> list[Finding]:
    cases = db.read(partial(load.load, [task_id]))
    return _differences(root, cases[0]) if cases else []


def _differences(root: Path, case: Case) -> list[Finding]:
    found = list(rows.check(case))
    try:
        found += folders.check(root, case, db.read(db.clock))
    except BlockingIOError:
        pass  # being written at this moment
    except OSError as error:
        found.append(Finding("unreadable", case.row["id"], error.strerror or str(error)))
    return found


def _repair(root: Path, task_id: str, found: list[Finding], rebuild: Rebuild) -> None:
    db.unit(partial(repair.mend, task_id))
    try:
        if any(one.code == "in_the_way" for one in found):
            set_aside(root, task_id)
        rebuild(task_id)
    except (OSError, TowerError):
        pass  # the next look finds it as it was, and says so


def _check_orphans(root: Path, *, repairs: bool) -> Iterator[Result]:
    try:
        names = (entry.name for entry in os.scandir(root))
        while page := list(islice(names, _PAGE)):
            yield from _check_page(root, [name for name in page if _is_id(name)], repairs)
    except FileNotFoundError:
        return  # nothing was ever traced
    except NotADirectoryError:
        yield Result(Finding("in_the_way", str(root), "TRACE_DIR"), is_repaired=False)


def _check_page(root: Path, names: list[str], repairs: bool) -> Iterator[Result]:
    known = db.read(lambda: {row[0] for row in Task.select(Task.id).where(Task.id << names).tuples()})
    for name in names:
        if name not in known and _is_old(root / name):
            yield Result(Finding("orphan_folder", name), is_repaired=repairs and _is_set_aside(root, name))


def _is_set_aside(root: Path, name: str) -> bool:
    try:
        set_aside(root, name)
    except OSError:
        return False
    return True


def _is_id(name: str) -> bool:
    try:
        return str(UUID(name)) == name
    except ValueError:
        return False


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > _YOUNG_S
    except FileNotFoundError:
        return False  # its task was deleted a moment ago, and now it is too
