"""Door 3, the command `tower`: starts the server and workers, and talks to a running tower."""

import io
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import click

from tower import __version__, cli_access, cli_fleet, cli_rules, jsontext, keeper, log, present
from tower.cli_options import as_json, asks, by, labels, task_id
from tower.client import Client, Unreachable
from tower.errors import SettingsError, TowerError
from tower.settings import load
from tower.terms import BROKEN, CANCELLED, STATUSES, SUCCEEDED

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 if the tower refused or the task failed, 2 for a wrong usage or setting, 3 if no tower answers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a log may hold what the terminal's encoding does not
    args = list(sys.argv[1:] if args is None else args)
    try:
        _check_text(args)
        return int(cli.main(args, prog_name="tower", standalone_mode=False) or 0)
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except jsontext.BadJson as error:
        _complain(str(error).replace("The body", "The payload"))
        return 2
    except TowerError as error:
        _complain(f"{error.message} ({error.code})")
        return 2 if isinstance(error, SettingsError) else 3 if isinstance(error, Unreachable) else 1


def _check_text(args: Sequence[str]) -> None:
    try:
        jsontext.check(args)
    except jsontext.BadJson:
        raise click.UsageError("An argument holds bytes that are not UTF-8; give a payload from a file, by --payload-file.") from None


def _complain(text: str) -> None:
    click.echo(f"tower: {present.plain(text)}", err=True)


class _Later(click.Command):
    """Stands for a command of a module that takes half a second to import, until it is asked for."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        super().__init__(name, help=short_help)
        #: Where it is, with `add_to`.
        self.module = module


class _Tower(click.Group):
    """The commands, of which some are imported when they are asked for."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the name of the command, the command, and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, _Later):
            import_module(command.module).add_to(self)  # in its place
            command = self.commands[str(command.name)]
        return name, command, rest


@click.group(cls=_Tower, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Run a DevOps Control Tower, or talk to one that runs."""


@cli.command(epilog="Example: tower up --port 8080")
@click.option("--host", help="The address to bind; HOST if absent.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to bind; PORT if absent, any free one if 0.")
def up(host: str | None, port: int | None) -> int:
    """Run the server; without REDIS_URL it runs the tasks as well."""
    from tower.main import main as serve  # noqa: PLC0415  # takes a second, which the other commands need not wait

    return serve(host=host, port=port)


@cli.command(epilog="Example: tower worker --processes 2 --threads 8")
@click.option("--processes", type=click.IntRange(1, 256), help="Worker processes; one for each core if absent.")
@click.option("--threads", type=click.IntRange(1, 256), help="Tasks that each process runs at once; 8 if absent.")
def worker(processes: int | None, threads: int | None) -> int:
    """Run workers for a tower whose broker is at REDIS_URL.

    A worker process that ends by itself is started again; the others go on with what they run.
    """
    settings = load()
    if settings.embedded:
        raise SettingsError("A worker of its own needs REDIS_URL; without it the server runs the tasks itself (`tower up`).")
    log.configure(settings)
    return keeper.keep(processes, threads)


@cli.command(epilog="Example: PORT=8080 tower check")
@as_json
def check(as_json: bool) -> None:
    """Print the settings in effect, and warnings.

    Secrets are masked. It needs no running tower.
    """
    from tower.db import open_database  # noqa: PLC0415  # takes half a second, which the other commands need not wait

    settings = load()
    masked, warnings = settings.masked(), settings.warnings()
    if as_json:
        click.echo(present.document({"settings": masked, "warnings": warnings}))
    else:
        click.echo(present.settings(masked))
        for warning in warnings:
            click.echo(f"warning: {present.plain(warning)}")
    open_database(settings)  # refuses what the server would; it connects when first used


@cli.command(epilog="Example: tower enqueue command --wait --cwd . -- git log -3")
@click.argument("type_", metavar="TYPE")
@click.argument("argv", metavar="[-- ARGV...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--payload", metavar="JSON", help="What the handler is given.")
@click.option("--payload-file", metavar="FILE", type=click.File("rb"), help="A file that holds the payload; - is standard input.")
@click.option("--cwd", metavar="DIR", type=Path, help="For a command: the folder to run in, on the worker's machine.")
@click.option("--title", help="A name for people.")
@click.option("--priority", type=int, help="Seconds of head start over tasks enqueued at the same moment.")
@click.option("--not-before", metavar="TIME", help="Start at this time at the earliest, as in 2031-05-01T08:00:00Z.")
@click.option("--timeout-s", type=float, help="Seconds that one attempt may run.")
@click.option("--max-attempts", type=int, help="Attempts that may fail; 1 makes it at most once.")
@click.option("--idempotency-key", metavar="KEY", help="The same key and task give the same id.")
@click.option("--concurrency-key", metavar="KEY", help="Tasks with the same key run one after the other.")
@click.option("--concurrency-limit", type=click.IntRange(1), help="Or so many with that key at once.")
@click.option("--silence-s", type=float, help="Seconds without output after which it is timed out.")
@click.option("--expires-at", metavar="TIME", help="Give it up if it has not started by this time.")
@click.option("--parent-id", metavar="ID", help="The task that asks for it; it joins its tree.")
@labels
@click.option("--requested-by", metavar="NAME", help="Who or what asks for it.")
@click.option("--wait", is_flag=True, help="Follow the log to the end; succeed only if the task does.")
@asks
def enqueue(
    client: Client,
    type_: str,
    argv: tuple[str, ...],
    payload: str | None,
    payload_file: IO[bytes] | None,
    cwd: Path | None,
    wait: bool,
    as_json: bool,
    **fields: Any,
) -> int | None:
    """Enqueue a task of TYPE and print its id.

    What follows -- is the program that a task of type command runs, with its arguments.
    """
    given = _payload(payload, payload_file)
    if argv or cwd:
        if type_ != "command":
            raise click.UsageError(f"Only a task of type command takes --cwd and a program after --, not {type_!r}; use --payload.")
        given = _with_program(given, argv, cwd)
    spec = {"type": type_, "payload": given, **{name: value for name, value in fields.items() if value is not None}}
    task_id, new = client.enqueue(spec)
    if not (wait and as_json):
        _tell_id(task_id, as_json, new=new)
    if not new:
        click.echo("tower: An earlier request with this idempotency key made the task.", err=True)
    return _wait(client, task_id, as_json) if wait else None


def _payload(text: str | None, file: IO[bytes] | None) -> Any:
    if text is not None and file is not None:
        raise click.UsageError("Give --payload or --payload-file, not both.")
    return jsontext.loads(file.read() if file else (text or "{}").encode(errors="surrogateescape"))


def _with_program(payload: Any, argv: Sequence[str], cwd: Path | None) -> Any:
    if not isinstance(payload, dict) or (argv and "argv" in payload):
        raise click.UsageError("Give the program in the payload or after --, not both.")
    program = {"argv": list(argv)} if argv else {}
    return {**payload, **program, **({"cwd": str(cwd.absolute())} if cwd else {})}


def _tell_id(task_id: str, as_json: bool, **more: Any) -> None:
    click.echo(present.document({"task_id": task_id, **more}) if as_json else present.plain(task_id))


def _wait(client: Client, task_id: str, as_json: bool) -> int:
    try:
        for line in client.follow(task_id):
            if not as_json:
                click.echo(present.log_line(line))
    except KeyboardInterrupt:
        _complain(f"Task {task_id} goes on. Follow it again with `tower logs -f {task_id}`, end it with `tower cancel {task_id}`.")
        raise
    task = client.task(task_id)
    if as_json:
        click.echo(present.document(task))
    if task["status"] == SUCCEEDED:
        return 0
    _complain(present.ending(task))
    return 1


@cli.command(epilog="Example: tower show 0192f0c1-2345-7abc-8def-0123456789ab")
@task_id
@asks
def show(client: Client, task_id: UUID, as_json: bool) -> None:
    """Show everything known about a task."""
    task = client.task(str(task_id))
    click.echo(present.document(task) if as_json else present.task(task))


@cli.command(epilog="Example: tower logs -f 0192f0c1-2345-7abc-8def-0123456789ab")
@task_id
@click.option("-f", "--follow", is_flag=True, help="Go on until the task's end.")
@asks
def logs(client: Client, task_id: UUID, follow: bool, as_json: bool) -> None:
    """Print a task's log; with --json, one object a line."""
    for line in client.follow(str(task_id)) if follow else client.log(str(task_id)):
        click.echo(present.json_line({"line": line}) if as_json else present.log_line(line))
    if follow and as_json:
        click.echo(present.json_line({"status": client.task(str(task_id))["status"]}))


_error_codes = click.option("--error-code", metavar="CODE", multiple=True, help="Only with this last error; may be given again.")


def _as_filter(labels: dict[str, str]) -> list[str]:
    return [f"{name}:{value}" for name, value in labels.items()]


@cli.command("list", epilog="Example: tower list --status failed --label team=platform")
@click.option("--status", multiple=True, type=click.Choice(STATUSES), help="Only with this status; may be given again.")
@click.option("--type", metavar="TYPE", multiple=True, help="Only of this type; may be given again.")
@labels
@click.option("--text", help="Only with this in the title, type or id.")
@_error_codes
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
@asks
def list_(client: Client, limit: int, labels: dict[str, str], as_json: bool, **filters: Any) -> None:
    """List tasks, newest first."""
    page = client.tasks(limit, label=_as_filter(labels), **filters)
    if as_json:
        click.echo(present.document(page))
    elif page["tasks"]:
        click.echo(present.tasks(page["tasks"]))
    else:
        click.echo("No task fits.", err=True)
    if page["next_cursor"] and not as_json:
        click.echo("There are more; raise --limit or narrow down.", err=True)


_dry_run = click.option("--dry-run", is_flag=True, help="Only say how many tasks there are.")
_one_or_many = click.argument("task_id", metavar="[ID]", type=click.UUID, required=False)


@cli.command(epilog="Example: tower cancel --tree 0192f0c1-2345-7abc-8def-0123456789ab")
@_one_or_many
@click.option("--tree", metavar="ID", type=click.UUID, help="Cancel every task with this correlation id instead.")
@_dry_run
@by
@asks
def cancel(client: Client, task_id: UUID | None, tree: UUID | None, dry_run: bool, by: str | None, as_json: bool) -> None:
    """Cancel a task, or a tree of them: at once what waits, within seconds what runs."""
    if (task_id is None) == (tree is None) or (task_id and dry_run):
        raise click.UsageError("Give the ID of one task, or --tree and perhaps --dry-run.")
    if tree:
        _tell_many(client.cancel_all({"correlation_id": str(tree)}, dry_run=dry_run, by=by), "cancelled", as_json)
        return
    told = client.cancel(str(task_id), by)
    done = "is cancelled" if told["status"] == CANCELLED else "is being stopped"
    click.echo(present.document(told) if as_json else f"Task {task_id} {done}.")


@cli.command(epilog="Example: tower retry --status failed --error-code worker_lost --dry-run")
@_one_or_many
@click.option("--status", multiple=True, type=click.Choice(BROKEN), help="All with this status; may be given again.")
@click.option("--type", metavar="TYPE", multiple=True, help="Only of this type; may be given again.")
@labels
@_error_codes
@_dry_run
@by
@asks
def retry(
    client: Client, task_id: UUID | None, labels: dict[str, str], dry_run: bool, by: str | None, as_json: bool, **filters: Any
) -> None:
    """Enqueue a task that has ended again and print the id of the new one; or every task that fits and was not retried yet."""
    chosen = {**filters, "label": _as_filter(labels)}
    if (task_id is None) != any(chosen.values()) or (task_id and dry_run):
        raise click.UsageError("Give the ID of one task, or --status, --type, --label or --error-code and perhaps --dry-run.")
    if task_id:
        _tell_id(client.retry(str(task_id), by), as_json)
    else:
        _tell_many(client.retry_all(chosen, dry_run=dry_run, by=by), "retried", as_json)


def _tell_many(told: dict[str, Any], done: str, as_json: bool) -> None:
    """Print the ids, so that a script can go on with them, and the number beside."""
    if as_json:
        click.echo(present.document(told))
        return
    for changed in told["task_ids"]:
        click.echo(present.plain(changed))
    count, would = (told["matched"], "would be ") if told["dry_run"] else (told["changed"], "")
    click.echo(f"tower: {count} {'task' if count == 1 else 'tasks'} {would}{done}.", err=True)


cli_access.add_to(cli)
cli_fleet.add_to(cli)
cli_rules.add_to(cli)
cli.add_command(_Later("backup", "tower.cli_backup", "Write every row to a new FILE, as it is at this moment."))
cli.add_command(
    _Later("restore", "tower.cli_backup", "Load the backup FILE into the database at DATABASE_URL, which must be empty and unused.")
)
cli.add_command(_Later("trace", "tower.cli_trace", "Look after the folders of tasks."))
cli.add_command(_Later("fsck", "tower.cli_trace", "Compare rows, folders and messages, and explain each difference."))
