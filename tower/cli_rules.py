"""The commands that limit, pause and explain: `tower limit`, `pause`, `resume`, `rules` and `why`."""

import re
from typing import Any
from uuid import UUID

import click

from tower import present
from tower.cli_options import asks, by, task_id
from tower.client import Client

_RATE = re.compile(r"(?P<limit>[0-9]{1,9})/(?P<per_s>[0-9]{1,9}(\.[0-9]{1,6})?)")
_LIMITED = click.Choice(("tower", "queue", "type", "key", "rate"))

_kind = click.argument("kind", type=click.Choice(("tower", "queue", "type", "key")), default="tower")
_name = click.argument("name", default="")


def add_to(cli: click.Group) -> None:
    """Make the commands known to `tower`."""
    for command in (limit, pause, resume, rules, why):
        cli.add_command(command)


def _rate(context: click.Context, option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """Return STARTS/SECONDS as the API takes it."""
    if value is None:
        return None
    match = _RATE.fullmatch(value)
    if not match:
        raise click.BadParameter(f"{value!r} is not STARTS/SECONDS, as in 10/60 for ten a minute.")
    return {"limit": int(match["limit"]), "per_s": float(match["per_s"])}


def _whole(kind: str, name: str) -> None:
    """Refuse a name where there is none, and none where there must be one."""
    if (kind == "tower") == bool(name):
        raise click.UsageError(f"The tower has no name, got {name!r}." if name else f"Which {kind}? Give its name.")


@click.command(epilog="Example: tower limit key repo:acme/api --max-running 2")
@click.argument("kind", type=_LIMITED)
@_name
@click.option("--max-running", type=click.IntRange(1), help="Tasks in flight at most.")
@click.option("--rate", metavar="STARTS/SECONDS", callback=_rate, help="For a rate key: starts at most within any so many seconds.")
@click.option("--off", is_flag=True, help="Lift the limit.")
@asks
def limit(client: Client, kind: str, name: str, max_running: int | None, rate: dict[str, Any] | None, off: bool, as_json: bool) -> None:
    """Limit the whole tower, or a queue, type, concurrency key or rate key by NAME."""
    _whole(kind, name)
    if off == (max_running is not None or rate is not None):
        raise click.UsageError("Give --max-running, or --rate for a rate key, or --off to lift the limit.")
    given = {"max_running": max_running, "rate": rate}
    told = (
        client.lift_limit(kind, name)
        if off
        else client.set_limit(kind, name, {key: value for key, value in given.items() if value is not None})
    )
    _tell(told, as_json)


@click.command(epilog='Example: tower pause queue default --by alice --reason "The test server is being upgraded."')
@_kind
@_name
@by
@click.option("--reason", metavar="TEXT", help="Why, for those who wait.")
@asks
def pause(client: Client, kind: str, name: str, by: str | None, reason: str | None, as_json: bool) -> None:
    """Start nothing: of the whole tower, or of a queue, type or concurrency key by NAME. What runs goes on."""
    _whole(kind, name)
    _tell(client.pause(kind, name, by, reason), as_json)


@click.command(epilog="Example: tower resume queue default")
@_kind
@_name
@by
@asks
def resume(client: Client, kind: str, name: str, by: str | None, as_json: bool) -> None:
    """Start tasks again, of whatever was paused."""
    _whole(kind, name)
    _tell(client.resume(kind, name, by), as_json)


@click.command(epilog="Example: tower rules")
@asks
def rules(client: Client, as_json: bool) -> None:
    """List the limits, rates and pauses in force."""
    told = client.rules()
    if as_json:
        click.echo(present.document(told))
    elif told["rules"]:
        click.echo(present.rules(told["rules"]))
    else:
        click.echo("Nothing is limited or paused.", err=True)


def _tell(rule: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(present.document(rule))
    elif rule["max_running"] or rule["rate"] or rule["paused_at"]:
        click.echo(present.rules([rule]))
    else:
        place = f"{rule['kind']} {rule['name']}" if rule["name"] else "the tower"
        click.echo(f"There is no rule for {present.plain(place)} any more; tower rules lists those in force.", err=True)


@click.command(epilog="Example: tower why 0192f0c1-2345-7abc-8def-0123456789ab")
@task_id
@asks
def why(client: Client, task_id: UUID, as_json: bool) -> None:
    """Say why a task waits, what would free it, and when it will start."""
    told = client.why(str(task_id))
    click.echo(present.document(told) if as_json else present.why(told))
