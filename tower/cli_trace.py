"""The commands that look after rows and folders themselves: `tower trace rebuild`, `tower fsck`. They need no running tower."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from uuid import UUID

import click

from actors.trace import Tracer
from tower import db, faults, fsck, present, queries
from tower.errors import NotFound
from tower.models import Task
from tower.settings import Settings, load

_PAGE = 500
#: A disk that refuses so many folders one after the other refuses them all.
_MOST_FAILURES = 20

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def add_to(cli: click.Group) -> None:
    """Make the commands known to `tower`."""
    cli.add_command(trace)
    cli.add_command(check_all)


@contextmanager
def _opened() -> Iterator[Settings]:
    settings = load()
    faults.arm(settings.fault)
    db.open_existing(settings)
    try:
        yield settings
    finally:
        db.close_database()


@click.group(epilog="Example: tower trace rebuild --all")
def trace() -> None:
    """Look after the folders of tasks."""


@trace.command(epilog="Example: tower trace rebuild 0192f0c1-2345-7abc-8def-0123456789ab")
@click.argument("task_ids", metavar="[ID...]", nargs=-1, type=click.UUID)
@click.option("--all", "is_all", is_flag=True, help="Every task there is.")
@click.option("--into", metavar="DIR", type=click.Path(path_type=Path), help="Write the folders here, and leave TRACE_DIR as it is.")
@_as_json
def rebuild(task_ids: tuple[UUID, ...], is_all: bool, into: Path | None, as_json: bool) -> int:
    """Write the folders of tasks again, from the database alone.

    It works beside a running tower and without one. It exits 1 if a folder could not be written.
    """
    if bool(task_ids) == is_all:
        raise click.UsageError("Name tasks by their ids, or give --all.")
    with _opened() as settings:
        count = db.read(lambda: Task.select().count()) if is_all else len(task_ids)
        ids = _every_id() if is_all else (str(task_id) for task_id in task_ids)
        written, failed = _rebuild(Tracer(settings), ids, count, into)
    if as_json:
        click.echo(present.document({"rebuilt": written, "failed": [{"task_id": task_id, "reason": why} for task_id, why in failed]}))
    else:
        click.echo(f"{written} folders written, {len(failed)} failed." if written != 1 else f"1 folder written, {len(failed)} failed.")
    return 1 if failed else 0


def _every_id() -> Iterator[str]:
    last = ""
    while page := db.read(partial(queries.ids, last, _PAGE)):
        yield from page
        last = page[-1]


def _rebuild(tracer: Tracer, ids: Iterator[str], count: int, into: Path | None) -> tuple[int, list[tuple[str, str]]]:
    """Write folder after folder; return how many were written, and the others with the reason."""
    written, in_a_row = 0, 0
    failed: list[tuple[str, str]] = []
    with click.progressbar(ids, length=count, file=sys.stderr, hidden=not sys.stderr.isatty(), show_pos=True) as shown:
        for task_id in shown:
            try:
                tracer.rebuild(task_id, into)
                written, in_a_row = written + 1, 0
            except (NotFound, OSError) as error:
                failed.append((task_id, error.message if isinstance(error, NotFound) else str(error)))
                in_a_row += 1
            if in_a_row == _MOST_FAILURES:
                break
    for task_id, reason in failed:
        click.echo(f"tower: {task_id}: {present.plain(reason)}", err=True)
    if in_a_row == _MOST_FAILURES:
        click.echo(f"tower: Stopped after {_MOST_FAILURES} failures in a row.", err=True)
    return written, failed


@click.command("fsck", epilog="Example: tower fsck --repair")
@click.option("--repair", is_flag=True, help="Put right what can be, by the rules of docs/recovery.md.")
@_as_json
def check_all(repair: bool, as_json: bool) -> int:
    """Compare rows, folders and messages, and explain each difference.

    It exits 0 if there is none, 1 if there are, and with --repair 1 if some are left.
    """
    total, left = 0, 0
    with _opened() as settings:
        for result in fsck.run(settings, Tracer(settings).rebuild if repair else None):
            total, left = total + 1, left + (not result.is_repaired)
            click.echo(present.json_line(result.document()) if as_json else present.plain(result.line(repair)))
    if as_json:
        click.echo(present.json_line({"differences": total, "left": left}))
    else:
        repaired = (
            f", {total - left} repaired, {left} left" if repair else "; `tower fsck --repair` puts right what it can" if total else ""
        )
        click.echo(f"{total} difference{'' if total == 1 else 's'} found{repaired}.")
    return 1 if left else 0
