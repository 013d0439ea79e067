"""The commands that look at the whole tower: `tower watch`, `handlers`, `workers`, `queues`, `open` and `completion`."""

import sys
import time
from typing import Any
from uuid import UUID

import click
from click.shell_completion import get_completion_class

from tower import present
from tower.cli_options import asks, tell
from tower.client import Client
from tower.settings import load
from tower.terms import DISPATCHED, FINAL, QUEUED, RUNNING

#: What comes first in the table of `tower watch`.
_ORDER = (RUNNING, DISPATCHED, QUEUED)


def add_to(cli: click.Group) -> None:
    """Make the commands known to `tower`."""
    for command in (watch, handlers, workers, queues, open_, completion):
        cli.add_command(command)


@click.command(epilog="Example: tower watch --every 2")
@click.option("--every", metavar="SECONDS", type=click.FloatRange(0.2, 3600), default=1.0, show_default=True, help="Between two looks.")
@click.option("--once", is_flag=True, help="Look once.")
@asks
def watch(client: Client, every: float, once: bool, as_json: bool) -> None:
    """Show what runs, waits and has just ended, again and again; Ctrl-C ends it.

    Where the output is no terminal, or with --json, each look is printed below the last.
    """
    while True:
        seen = _look(client)
        if sys.stdout.isatty() and not as_json and not once:
            click.clear()
        click.echo(present.json_line(seen) if as_json else present.watch(seen))
        if once:
            return
        time.sleep(every)


def _look(client: Client) -> dict[str, Any]:
    active = [task for status in _ORDER for task in reversed(client.tasks(20, status=[status])["tasks"])]
    ended = client.tasks(8, status=list(FINAL))["tasks"]
    return {"health": client.readiness(), "queues": client.queues(), "active": active, "ended": ended}


@click.command(epilog="Example: tower handlers")
@asks
def handlers(client: Client, as_json: bool) -> None:
    """List the task types; with --json also the schema of their payloads."""
    tell("handlers", client.handlers(), as_json, present.handlers)


@click.command(epilog="Example: tower workers")
@asks
def workers(client: Client, as_json: bool) -> None:
    """List the live workers and how many of their slots are taken."""
    tell("workers", client.workers(), as_json, present.workers, "No worker is alive: tasks wait; start one with `tower worker`.")


@click.command(epilog="Example: tower queues")
@asks
def queues(client: Client, as_json: bool) -> None:
    """List the queues and what is in them."""
    tell("queues", client.queues(), as_json, present.queues)


@click.command("open", epilog="Example: tower open")
@click.argument("task_id", metavar="[ID]", type=click.UUID, required=False)
@click.option("--url", help="The tower to look at; TOWER_URL if absent.")
def open_(task_id: UUID | None, url: str | None) -> None:
    """Open the tower, or a task, in the browser; prints the address, for where there is none."""
    address = f"{load(url=url).url.rstrip('/')}/{f'ui/tasks/{task_id}' if task_id else ''}"
    click.echo(address)
    click.launch(address)


@click.command(epilog='Example: eval "$(tower completion bash)"')
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete the commands and options of `tower`; put it where the shell starts."""
    known = get_completion_class(shell)
    assert known is not None  # noqa: S101  # click knows all three
    click.echo(known(context.find_root().command, {}, "tower", "_TOWER_COMPLETE").source())
