"""The commands about who may come in: `tower keys`, `tower audit` and `tower me`."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from tower import present
from tower.cli_options import asks, labels, tell
from tower.client import Client
from tower.terms import ROLES

_SPAN = re.compile(r"([1-9][0-9]{0,4})([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def add_to(cli: click.Group) -> None:
    """Make the commands known to `tower`."""
    for command in (keys, audit, me):
        cli.add_command(command)


def _span(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """Return the time that lies so far ahead."""
    if value is None:
        return None
    match = _SPAN.fullmatch(value)
    if not match:
        raise click.BadParameter(f"{value!r} is no span such as 90d, 12h or 30m.")
    at = datetime.now(UTC) + timedelta(**{_UNITS[match[2]]: int(match[1])})
    return at.isoformat(timespec="seconds").replace("+00:00", "Z")


@click.group(epilog="Example: tower keys create ci --role operator")
def keys() -> None:
    """Make, list and revoke the keys that open the tower; that takes the key of an admin."""


@keys.command("list", epilog="Example: tower keys list")
@asks
def list_(client: Client, as_json: bool) -> None:
    """List the keys, newest first; what they begin with tells them apart."""
    tell("keys", client.keys(), as_json, present.keys, "There is no key yet.")


@keys.command(epilog="Example: tower keys create ci --role operator --type command --label team=platform --expires-in 90d")
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), required=True, help="Look, also run and stop tasks, or everything.")
@click.option("--type", "types", metavar="TYPE", multiple=True, help="Limit it to this type; may be given again.")
@labels
@click.option("--expires-in", "expires_at", metavar="SPAN", callback=_span, help="Let it end after this, as in 90d, 12h or 30m.")
@asks
def create(
    client: Client, name: str, role: str, types: tuple[str, ...], labels: dict[str, str], expires_at: str | None, as_json: bool
) -> None:
    """Make a key for NAME and print it: nobody can ask for it again."""
    asked: dict[str, Any] = {"name": name, "role": role, "types": list(types), "labels": labels, "expires_at": expires_at}
    told = client.create_key(**asked)
    if as_json:
        click.echo(present.document(told))
        return
    click.echo(present.plain(told["key"]))
    click.echo("tower: Keep it now, it is told this once. The command line takes it from TOWER_KEY.", err=True)


@keys.command(epilog="Example: tower keys revoke twr_0123456789")
@click.argument("key_id", metavar="KEY")
@asks
def revoke(client: Client, key_id: str, as_json: bool) -> None:
    """Let a key, named by what it begins with, open nothing any more."""
    told = client.revoke_key(key_id[:14])
    click.echo(present.document(told) if as_json else f"The key {present.plain(told['id'])} opens nothing any more.")


@click.command(epilog="Example: tower audit --limit 20")
@click.option("--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="How many at most.")
@asks
def audit(client: Client, limit: int, as_json: bool) -> None:
    """List who changed what, newest first; what was done to a task is among its events as well."""
    tell("entries", client.audit(limit), as_json, present.audit, "Nothing was changed yet.")


@click.command(epilog="Example: TOWER_KEY=twr_… tower me")
@asks
def me(client: Client, as_json: bool) -> None:
    """Say whom the tower takes you for, and what you may do."""
    told = client.me()
    limits = [*told["types"], *(f"{name}={value}" for name, value in told["labels"].items())]
    facts = [
        ("name", told["name"]),
        ("role", told["role"]),
        ("key", told["key_id"] or "none"),
        ("limited to", " ".join(limits) or "no types or labels, it is for all"),
    ]
    click.echo(present.document(told) if as_json else present.pairs(facts))
