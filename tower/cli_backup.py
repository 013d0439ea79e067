"""The commands that carry a tower's rows away and bring them back: `tower backup`, `tower restore`."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tower import backup, db, present
from tower.cli_options import as_json
from tower.settings import load

_STEP = 1000

_file = click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))


def add_to(cli: click.Group) -> None:
    """Make the commands known to `tower`."""
    cli.add_command(back_up)
    cli.add_command(bring_back)


@click.command("backup", epilog="Example: tower backup tower-2031-05-01.tar.gz")
@_file
@as_json
def back_up(file: Path, as_json: bool) -> None:
    """Write every row to a new FILE, as it is at this moment.

    It needs no running tower and may run beside one. Folders are not in it: they follow from the rows.
    """
    db.open_existing(load())
    try:
        with _counted() as progress:
            manifest = backup.backup(file, progress)
    finally:
        db.close_database()
    _tell(manifest, f"{file} holds", as_json)


@click.command("restore", epilog="Example: tower restore tower-2031-05-01.tar.gz")
@_file
@as_json
def bring_back(file: Path, as_json: bool) -> None:
    """Load the backup FILE into the database at DATABASE_URL, which must be empty and unused.

    All of it or nothing. The tower that starts on it goes on with the tasks and writes their folders again.
    """
    settings = load()
    db.open_database(settings)
    try:
        with _counted() as progress:
            manifest = backup.restore(file, settings, progress)
    finally:
        db.close_database()
    _tell(manifest, "Restored", as_json)


def _tell(manifest: dict[str, Any], done: str, as_json: bool) -> None:
    counts = {name: table["rows"] for name, table in manifest["tables"].items()}
    click.echo(present.document(manifest) if as_json else f"{done} {counts['task']} tasks and {sum(counts.values())} rows in all.")


@contextmanager
def _counted() -> Iterator[backup.Progress]:
    """Show on a terminal how far it has come."""
    shown = sys.stderr.isatty()

    def progress(table: str, count: int) -> None:
        if shown and count % _STEP == 0:
            click.echo(f"\r{table}: {count} rows\x1b[K", nl=False, err=True)

    yield progress
    if shown:
        click.echo("\r\x1b[K", nl=False, err=True)
