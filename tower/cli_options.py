"""What the commands that talk to a tower share: its URL, --json, and the options that several of them take."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import click

from tower import present
from tower.client import Client
from tower.settings import load

Command = Callable[..., int | None]

task_id = click.argument("task_id", metavar="ID", type=click.UUID)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
by = click.option("--by", metavar="NAME", help="Who asks, for the record.")


def asks(command: Command) -> Command:
    """Hand the command a client of the tower at --url, and give it --json."""

    @click.option("--url", help="The tower to talk to; TOWER_URL if absent.")
    @as_json
    @functools.wraps(command)
    def with_client(*args: Any, url: str | None, **options: Any) -> int | None:
        settings = load(url=url)
        with Client(settings.url, key=settings.key.get_secret_value() if settings.key else None) as client:
            return command(client, *args, **options)

    return with_client


def tell(name: str, found: list[Any], as_json: bool, table: Callable[[list[Any]], str], nothing: str = "") -> None:
    """Print a list: as JSON under its name, else as a table, or a word on standard error if it is empty."""
    if as_json:
        click.echo(present.document({name: found}))
    elif found or not nothing:
        click.echo(table(found))
    else:
        click.echo(nothing, err=True)


def _pairs(context: click.Context, option: click.Parameter, values: Iterable[str]) -> dict[str, str]:
    """Return name=value options as a dict."""
    split = [value.partition("=") for value in values]
    for name, equals, _ in split:
        if not name or not equals:
            raise click.BadParameter(f"{name + equals!r} is not name=value, as in team=platform.")
    return {name: value for name, _, value in split}


labels = click.option("--label", "labels", metavar="NAME=VALUE", multiple=True, callback=_pairs, help="A label; may be given again.")
