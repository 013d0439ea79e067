"""The command `tower`, run against a real server process."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest

from tests.servers import Redis, free_port, wait_for
from tower import __version__, cli_backup, cli_trace, present
from tower.cli import cli, main

TOWER = str(Path(sys.executable).with_name("tower"))
NO_SUCH_TASK = "0192f0c1-2345-7abc-8def-0123456789ab"
QUICK = {"TOWER_BEAT_S": "0.2", "TOWER_SWEEP_S": "0.2", "PYTHONUNBUFFERED": "1"}

slow = pytest.mark.slow


class Processes:
    """Commands that run on until the end of a test, all in one folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"DATABASE_URL": f"sqlite:///{folder / 'tower.db'}", "TRACE_DIR": str(folder / "logs"), "TOWER_URL": self.url}
        self.environment = {"PATH": os.environ["PATH"], **QUICK, **own, **environment}
        self._all: list[subprocess.Popen[str]] = []

    def spawn(self, *command: str, **more: Any) -> "subprocess.Popen[str]":
        process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, text=True, **more)
        self._all.append(process)
        return process

    def serve(self, *command: str) -> "subprocess.Popen[str]":
        with (self.folder / "server.log").open("a") as log:
            process = self.spawn(*command, stdout=log, stderr=log)
        wait_for("the server", self._ready)
        return process

    def _ready(self) -> bool:
        try:
            return bool(httpx2.get(f"{self.url}/health/ready").json()["workers"])
        except httpx2.TransportError:
            return False

    def end(self) -> None:
        for process in self._all:
            process.terminate()
        for process in self._all:
            process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """An embedded tower of its own process for the tests of this file."""
    started = Processes(tmp_path_factory.mktemp("cli"), PORT=str(port := free_port()))
    started.port, started.url = port, f"http://127.0.0.1:{port}"
    started.serve(sys.executable, "-m", "devops_control_tower.main")
    yield started
    started.end()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Room for processes of a test's own."""
    room = Processes(tmp_path)
    yield room
    room.end()


@dataclass
class Told:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def id(self) -> str:
        assert self.code == 0, self.err
        return self.out.strip()


Run = Callable[..., Told]


@pytest.fixture
def run_local(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in this process, with nothing set in the environment."""
    for name in ("DATABASE_URL", "REDIS_URL", "HOST", "PORT", *(name for name in os.environ if name.startswith("TOWER_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Told:
        code = main(args)
        out, err = capsys.readouterr()
        return Told(code, out, err)

    return run


@pytest.fixture
def run(run_local: Run, server: Processes, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process that talks to the server."""
    monkeypatch.setenv("TOWER_URL", server.url)
    return run_local


def test_it_says_its_version(run_local: Run) -> None:
    """`tower --version` names the package's version."""
    assert run_local("--version") == Told(0, f"tower {__version__}\n", "")


def _whole() -> dict[str, click.Command]:
    """Every command, those too that are imported when they are asked for."""
    cli_backup.add_to(cli)
    cli_trace.add_to(cli)
    return cli.commands


def test_a_command_that_is_not_imported_yet_is_listed_as_it_will_be() -> None:
    """And there it is then, with all it has; in a process that knows none of them yet."""
    code = """
from tower.cli import cli
from click.testing import CliRunner
listed = {name: command.get_short_help_str(1000) for name, command in cli.commands.items()}
waiting = {name for name, command in cli.commands.items() if type(command).__name__ == "_Later"}
for name in waiting:
    told = CliRunner().invoke(cli, [name, "--help"])
    assert told.stdout.startswith(f"Usage: cli {name} [OPTIONS]"), told.stdout
    assert told.stdout.rstrip().endswith(cli.commands[name].epilog), told.stdout
assert {name: command.get_short_help_str(1000) for name, command in cli.commands.items()} == listed
print(*sorted(waiting))
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stdout == "backup fsck restore trace\n"


def test_every_command_shows_an_example(run_local: Run) -> None:
    """The help of each command ends with a line to copy."""
    for name in cli.commands:
        assert re.search(rf"Example: .*tower {name}\b", run_local(name, "--help").out), name


def test_the_guide_names_every_command_and_option() -> None:
    """docs/cli.md keeps up with the code."""
    guide = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    for name, command in _whole().items():
        assert f"tower {name}" in guide
        options = [option.opts[0] for option in command.params if isinstance(option, click.Option)]
        assert [option for option in options if option not in guide] == []


def test_check_masks_secrets_and_warns(run_local: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords never appear, the rest does, with what is probably not meant."""
    monkeypatch.setenv("REDIS_URL", "redis://:geheim@cache:6379/0")
    monkeypatch.setenv("TOWER_URL", "https://me:geheim@tower.example")

    told, machine = run_local("check"), run_local("check", "--json").document

    assert told.code == 0
    assert "geheim" not in told.out + json.dumps(machine)
    assert re.search(r"^REDIS_URL +redis://:\*\*\*@cache:6379/0$", told.out, re.MULTILINE)
    assert "warning: REDIS_URL is set but DATABASE_URL is SQLite" in told.out
    assert (machine["settings"]["PORT"], len(machine["warnings"])) == (8000, 1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PORT", "eighty", "PORT='eighty'"),
        ("REDIS_URL", "redis://me:geheim@[bad", "REDIS_URL='redis://***'"),
        ("DATABASE_URL", "me:geheim@db", "DATABASE_URL='***'"),
        ("TOWER_URL", "localhost:8000", "TOWER_URL='localhost:8000': expected http://host:port"),
        ("TOWER_BOOTSTRAP_KEY", "geheim", "TOWER_BOOTSTRAP_KEY='***': Value should have at least 20 items"),
    ],
)
def test_a_wrong_setting_is_named_and_exits_2(run_local: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    """`tower check` fails where the server would refuse to start."""
    monkeypatch.setenv(name, value)

    told = run_local("check")

    assert told.code == 2
    assert said in told.err
    assert "geheim" not in told.err


def test_a_worker_needs_redis(run_local: Run) -> None:
    """Without REDIS_URL a worker would never get a task."""
    told = run_local("worker")

    assert (told.code, told.out) == (2, "")
    assert "needs REDIS_URL" in told.err


@pytest.mark.parametrize("command", [["list"], ["logs", "-f", NO_SUCH_TASK], ["show", NO_SUCH_TASK], ["enqueue", "echo", "--wait"]])
def test_no_tower_exits_3_and_says_how_to_start_one(run_local: Run, command: list[str]) -> None:
    """A command that reaches nothing says so at once."""
    url = f"http://me:geheim@127.0.0.1:{free_port()}"

    told = run_local(*command, "--url", url)

    assert (told.code, told.out) == (3, "")
    assert told.err == f"tower: No tower answers at {url.replace('geheim', '***')}; start one with `tower up`. (unreachable)\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["enqueue", "echo", "--payload", "{bad"], "The payload is not JSON"),
        (["enqueue", "echo", "--payload", '{"a": 1, "a": 2}'], "stands twice"),
        (["enqueue", "echo", "--payload-file", "nowhere.json"], "No such file"),
        (["enqueue", "echo", "--payload", "{}", "--payload-file", "-"], "not both"),
        (["enqueue", "echo", "--label", "team"], "name=value"),
        (["enqueue", "echo", "--timeout-s", "nan"], "Not JSON"),
        (["enqueue", "echo", "--", "git"], "Only a task of type command"),
        (["enqueue", "command", "--payload", '{"argv": ["a"]}', "--", "b"], "not both"),
        (["list", "--status", "done"], "'done' is not one of"),
        (["list", "--text", "\udcff"], "are not UTF-8; give a payload from a file"),
        (["list", "--url", "http://[bad"], "Invalid IPv6 URL"),
        (["show", "42"], "not a valid UUID"),
        (["cancel"], "Give the ID of one task, or --tree"),
        (["cancel", NO_SUCH_TASK, "--tree", NO_SUCH_TASK], "Give the ID of one task, or --tree"),
        (["cancel", NO_SUCH_TASK, "--dry-run"], "Give the ID of one task, or --tree"),
        (["retry"], "Give the ID of one task, or --status"),
        (["retry", NO_SUCH_TASK, "--status", "failed"], "Give the ID of one task, or --status"),
        (["retry", "--status", "succeeded"], "'succeeded' is not one of"),
        (["frobnicate"], "No such command"),
    ],
)
def test_a_wrong_usage_exits_2_with_the_reason(run_local: Run, command: list[str], said: str) -> None:
    """What the tower need not be asked is refused here."""
    told = run_local(*command)

    assert (told.code, told.out) == (2, "")
    assert said in told.err


def test_a_log_line_keeps_its_colours_and_nothing_else_that_acts() -> None:
    """A task cannot move the cursor, set the title, turn the text, or colour the next line."""
    assert present.log_line("a\tb") == "a\tb"
    assert present.log_line("\x1b[31mred") == "\x1b[31mred\x1b[0m"
    assert present.log_line("x\x1b]0;t\x07\x1b[2J\u202e\x9by") == "x\ufffd]0;t\ufffd\ufffd[2J\ufffd\ufffdy"


@slow
def test_a_task_can_be_enqueued_followed_and_shown(run: Run) -> None:
    """Every field of a task has its option, and `--wait` exits 0 when it succeeds."""
    told = run(
        "enqueue", "echo", "--payload", '{"hello": "tower"}', "--title", "Say hello", "--priority", "60", "--timeout-s", "9.5",
        "--not-before", "2020-01-01T00:00:00Z", "--max-attempts", "3", "--idempotency-key", "first", "--concurrency-key", "one",
        "--label", "team=platform", "--label", "repo=a=b", "--requested-by", "alice", "--wait", "--json",
    )  # fmt: skip

    task = told.document
    assert told.code == 0
    assert (task["status"], task["result"], task["title"], task["priority"]) == ("succeeded", {"hello": "tower"}, "Say hello", 60)
    assert (task["timeout_s"], task["not_before"], task["max_attempts"]) == (9.5, "2020-01-01T00:00:00.000Z", 3)
    assert (task["concurrency_key"], task["labels"]) == ("one", {"team": "platform", "repo": "a=b"})
    assert run("show", task["id"], "--json").document["id"] == task["id"]
    shown = run("show", task["id"]).out
    assert re.search(r"^status: +succeeded$", shown, re.MULTILINE)
    assert "team=platform repo=a=b" in shown


@slow
def test_the_program_of_a_command_follows_two_dashes(run: Run, tmp_path: Path) -> None:
    """Its output is printed while one waits; its folder may be relative to where one stands."""
    (tmp_path / "inner").mkdir()

    told = run("enqueue", "command", "--cwd", "inner", "--wait", "--", "sh", "-c", "pwd; printf '\\033[31mred\\033[0m\\n'", "--wait")

    assert told.code == 0
    assert f" {tmp_path}/inner\n" in told.out
    assert "] red\n" in told.out  # no colour where there is no terminal
    assert told.out.rstrip().endswith("succeeded")


@slow
def test_waiting_for_a_task_that_fails_exits_1(run: Run) -> None:
    """The reason and the cure are on standard error, with the code."""
    told = run("enqueue", "command", "--wait", "--", "sh", "-c", "echo broken; exit 3")

    assert told.code == 1
    assert "] broken\n" in told.out
    assert re.search(r"^tower: Task \S+ failed: sh exited with code 3\. .* \(exit_nonzero\)$", told.err.strip())
    shown = run("show", told.out.split()[0]).out
    assert "why it waits" not in shown
    assert re.search(r"^status: +failed \(exit_nonzero\)$", shown, re.MULTILINE)
    assert "\ntail:\n  broken\n" in shown


@slow
def test_a_payload_comes_from_a_file_or_standard_input(run: Run, server: Processes, tmp_path: Path) -> None:
    """A payload that is too long or too secret for an argument has its way."""
    (tmp_path / "payload.json").write_text('{"from": "file"}')
    told = run("enqueue", "echo", "--wait", "--json", "--payload-file", "payload.json")
    assert told.document["result"] == {"from": "file"}

    command = [TOWER, "enqueue", "echo", "--wait", "--json", "--payload-file", "-"]
    environment = {**server.environment, "TOWER_URL": server.url}
    piped = subprocess.run(command, input='{"from": "é"}', env=environment, capture_output=True, text=True, check=True)
    assert json.loads(piped.stdout)["result"] == {"from": "é"}


@slow
def test_an_error_of_the_tower_is_told_with_its_code(run: Run) -> None:
    """The server's own sentence reaches the user, and the exit code is 1."""
    assert run("enqueue", "ehco") == Told(
        1, "", "tower: No handler for type 'ehco'. Did you mean 'echo'? Known: command, echo, http, sleep. (unknown_type)\n"
    )
    told = run("show", NO_SUCH_TASK)
    assert (told.code, told.out) == (1, "")
    assert told.err.endswith("(task_not_found)\n")


@slow
def test_the_same_idempotency_key_gives_the_first_task(run: Run) -> None:
    """It is told that nothing new was made."""
    first = run("enqueue", "echo", "--idempotency-key", "once").id
    again = run("enqueue", "echo", "--idempotency-key", "once")

    assert again.id == first
    assert "An earlier request" in again.err
    assert run("enqueue", "echo", "--idempotency-key", "once", "--json").document == {"task_id": first, "new": False}


@slow
def test_a_list_is_filtered_and_aligned(run: Run) -> None:
    """Every filter narrows; the columns stand below each other."""
    wanted = run("enqueue", "echo", "--label", "run=list", "--title", "wanted", "--wait").out.split()[0]
    other = run("enqueue", "sleep", "--payload", '{"seconds": 0}', "--label", "run=list", "--wait").out.split()[0]

    told = run("list", "--label", "run=list", "--type", "echo", "--status", "succeeded", "--text", "wanted")

    head, row = told.out.splitlines()
    assert row.startswith(wanted)
    assert (head.index("STATUS"), head.index("TITLE")) == (row.index("succeeded"), row.index("wanted"))
    page = run("list", "--label", "run=list", "--limit", "1", "--json").document
    assert ([task["id"] for task in page["tasks"]], page["next_cursor"]) == ([other], other)
    assert "There are more" in run("list", "--label", "run=list", "--limit", "1").err
    assert run("list", "--text", "nonesuch") == Told(0, "", "No task fits.\n")


@slow
def test_a_payload_cannot_act_on_the_terminal(run: Run) -> None:
    """A C1 escape and a change of direction are made visible for people, and escaped in JSON."""
    task_id = run("enqueue", "echo", "--payload", '{"k": "a\x9b2Jb\u202ec"}').id

    assert '"k": "a\ufffd2Jb\ufffdc"' in run("show", task_id).out
    assert r'"k": "a\u009b2Jb\u202ec"' in run("show", task_id, "--json").out


@slow
def test_a_waiting_task_is_cancelled_and_retried(run: Run) -> None:
    """`retry` gives a new task that names the old one."""
    task_id = run("enqueue", "sleep", "--payload", '{"seconds": 0}', "--not-before", "2031-05-01T08:00:00Z").id
    assert "queued (not_before)" in run("show", task_id).out

    assert run("cancel", task_id, "--by", "bob").out == f"Task {task_id} is cancelled.\n"

    again = run("retry", task_id, "--by", "bob").id
    shown = run("show", again, "--json").document
    assert (shown["retry_of"], shown["requested_by"]) == (task_id, "bob")
    assert set(run("retry", task_id, "--json").document) == {"task_id"}


@slow
def test_what_cannot_be_cancelled_or_retried_exits_1(run: Run) -> None:
    """A final state is never changed, and a task that has not ended cannot be repeated."""
    ended = run("enqueue", "echo", "--wait").out.split()[0]
    waiting = run("enqueue", "echo", "--not-before", "2031-05-01T08:00:00Z").id

    cancelled, retried = run("cancel", ended), run("retry", waiting)

    assert (cancelled.code, retried.code) == (1, 1)
    assert cancelled.err.endswith("(already_final)\n")
    assert retried.err.endswith("(not_final)\n")


@slow
def test_logs_are_printed_whole_or_as_json_lines(run: Run) -> None:
    """Both ways tell the same lines; a followed log ends with the status."""
    task_id = run("enqueue", "command", "--wait", "--", "printf", "one\\ntwo").out.split()[0]

    lines = run("logs", task_id).out.splitlines()

    assert [line.split("] ")[1] for line in lines[-3:]] == ["one", "two", "── succeeded"]
    assert run("logs", "-f", task_id).out.splitlines() == lines
    documents = [json.loads(line) for line in run("logs", "-f", "--json", task_id).out.splitlines()]
    assert documents == [*({"line": line} for line in lines), {"status": "succeeded"}]


@slow
def test_ctrl_c_ends_quietly_with_130(run: Run, server: Processes) -> None:
    """Whoever stops looking sees no traceback, and the task goes on."""
    task_id = run("enqueue", "sleep", "--payload", '{"seconds": 600}').id
    looking = server.spawn(TOWER, "logs", "-f", task_id, "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert looking.stdout
    assert "queued" in looking.stdout.readline()

    looking.send_signal(signal.SIGINT)
    _, err = looking.communicate(timeout=20)

    assert (looking.returncode, err.strip()) == (130, "")
    assert run("cancel", task_id, "--json").document["task_id"] == task_id


@slow
def test_a_reader_that_stops_early_is_no_error_message(run: Run, server: Processes) -> None:
    """`tower logs … | head -1` prints one line and nothing else."""
    task_id = run("enqueue", "command", "--wait", "--", "seq", "20000").out.split()[0]

    command = f"'{TOWER}' logs {task_id} --url {server.url} | head -1"
    told = subprocess.run(["sh", "-c", command], env=server.environment, capture_output=True, text=True, check=True)

    assert (told.stdout.count("\n"), told.stderr) == (1, "")


@slow
def test_a_followed_log_outlives_the_server(processes: Processes) -> None:
    """When the server dies and comes back on its port, following goes on; no line is lost or told twice."""
    processes.environment["TOWER_LEASE_S"] = "2"
    up = (TOWER, "up", "--port", str(processes.port))
    first = processes.serve(*up)
    program = ("sh", "-c", "echo first; until [ -e go ]; do sleep 0.05; done; echo last")
    options = ("--cwd", ".", "--wait", "--max-attempts", "5")
    waiting = processes.spawn(TOWER, "enqueue", "command", *options, "--", *program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert waiting.stdout
    seen = []
    while not seen or not seen[-1].endswith("] first\n"):
        seen.append(waiting.stdout.readline())
        assert seen[-1], waiting.stderr and waiting.stderr.read()

    first.kill()
    first.wait()
    (processes.folder / "go").touch()
    processes.serve(*up)
    rest, err = waiting.communicate(timeout=60)

    lines = "".join(seen).splitlines() + rest.splitlines()
    assert (waiting.returncode, err) == (0, "")
    assert len(lines) == len(set(lines))
    assert lines[-1].endswith("[2] ── succeeded")
    assert [line for line in lines if line.endswith("] last")]


@slow
def test_a_worker_runs_the_tasks_of_a_tower_with_redis(processes: Processes, redis_server: Redis) -> None:
    """`tower up` and `tower worker` of the same environment make a tower on services."""
    processes.environment["REDIS_URL"] = redis_server.url()
    processes.environment["PORT"] = str(processes.port)
    with (processes.folder / "worker.log").open("a") as log:
        processes.spawn(TOWER, "worker", "--processes", "1", "--threads", "3", stdout=log, stderr=log)
    processes.serve(TOWER, "up")

    command = [TOWER, "enqueue", "echo", "--wait"]
    told = subprocess.run(command, env=processes.environment, capture_output=True, text=True, timeout=60, check=True)

    assert "succeeded" in told.stdout
    (worker,) = httpx2.get(f"{processes.url}/workers").json()["workers"]
    assert worker["slots"] == 3


@slow
def test_a_worker_process_that_dies_takes_nobody_with_it(processes: Processes, redis_server: Redis) -> None:
    """Another takes its place, and what the others run goes on, also if it may run at most once; asked to stop, all end."""
    processes.environment |= {"REDIS_URL": redis_server.url(), "TOWER_LEASE_S": "3"}
    worker = processes.spawn(TOWER, "worker", "--processes", "2", "--threads", "1")
    processes.serve(TOWER, "up", "--port", str(processes.port))

    def workers() -> dict[str, dict[str, Any]]:
        return {one["id"]: one for one in httpx2.get(f"{processes.url}/workers").json()["workers"]}

    wait_for("both workers", lambda: len(workers()) == 2)
    held = httpx2.post(f"{processes.url}/tasks/enqueue", json={"type": "sleep", "payload": {"seconds": 600}, "max_attempts": 1}).json()[
        "task_id"
    ]
    wait_for("it to run", lambda: sum(one["running"] for one in workers().values()) == 1)
    busy, idle = sorted(workers().values(), key=lambda one: -one["running"])
    os.kill(idle["pid"], signal.SIGKILL)
    wait_for("another worker", lambda: len(workers()) == 2 and idle["id"] not in workers(), 60)
    told = httpx2.get(f"{processes.url}/tasks/{held}").json()
    assert (told["status"], told["attempt"], busy["id"] in workers()) == ("running", 1, True)
    worker.terminate()
    assert worker.wait(60) == 0
    wait_for("no worker", lambda: not workers())


@slow
def test_dead_letters_are_listed_counted_and_retried(run: Run) -> None:
    """By what they have in common; standard output holds the ids alone."""
    options = ("--label", "run=dead", "--max-attempts", "1", "--wait", "--", "sh", "-c", "exit 3")
    old = run("enqueue", "command", *options).out.split()[0]
    chosen = ("--status", "failed", "--error-code", "exit_nonzero", "--label", "run=dead")

    assert run("list", *chosen).out.splitlines()[1].startswith(old)
    assert run("retry", *chosen, "--type", "command", "--dry-run") == Told(0, f"{old}\n", "tower: 1 task would be retried.\n")
    new = run("retry", *chosen, "--by", "alice")
    assert new.err == "tower: 1 task retried.\n"
    assert run("show", new.id, "--json").document["retry_of"] == old
    assert run("retry", "--status", "cancelled", "--label", "run=dead", "--json").document["matched"] == 0


@slow
def test_a_tree_is_cancelled(run: Run) -> None:
    """After a look at how many tasks it has."""
    root = run("enqueue", "echo", "--not-before", "2500-01-01T00:00:00Z").id

    assert run("cancel", "--tree", root, "--dry-run") == Told(0, f"{root}\n", "tower: 1 task would be cancelled.\n")
    assert run("cancel", "--tree", root) == Told(0, f"{root}\n", "tower: 1 task cancelled.\n")
    assert run("show", root, "--json").document["status"] == "cancelled"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["limit", "key", "k"], "Give --max-running"),
        (["limit", "rate", "api", "--rate", "ten"], "STARTS/SECONDS"),
        (["limit", "queue", "--max-running", "3"], "Which queue?"),
        (["limit", "key", "k", "--max-running", "3", "--off"], "--off to lift"),
        (["pause", "tower", "everything"], "The tower has no name"),
        (["resume", "rate", "api"], "'rate' is not one of"),
    ],
)
def test_a_rule_that_cannot_be_meant_exits_2(run_local: Run, command: list[str], said: str) -> None:
    """Before any tower is asked."""
    told = run_local(*command)

    assert (told.code, told.out) == (2, "")
    assert said in told.err


@slow
def test_what_is_limited_or_paused_is_listed_and_explained(run: Run) -> None:
    """Set, look, ask why a task waits, and take it all off again."""
    assert run("rules") == Told(0, "", "Nothing is limited or paused.\n")
    assert run("limit", "key", "repo:acme/api", "--max-running", "2", "--json").document["max_running"] == 2
    assert run("limit", "rate", "api:git hub", "--rate", "10/60").out.splitlines()[1:] == ["rate  api:git hub               10/60s"]
    run("limit", "tower", "--max-running", "50")
    run("pause", "type", "echo", "--by", "alice", "--reason", "upgrade")

    listed = run("rules").out
    assert re.search(r"^key +repo:acme/api +2$", listed, re.MULTILINE)
    assert re.search(r"^rate +api:git hub +10/60s$", listed, re.MULTILINE)
    assert re.search(r"^type +echo +\S+Z by alice +upgrade$", listed, re.MULTILINE)
    waiting = run("enqueue", "echo").id
    why = run("why", waiting).out
    assert re.match(r"queued: type echo is paused since \S+ by alice: upgrade\n", why)
    assert "frees: when it is resumed: tower resume type echo" in why
    assert "starts: nobody can tell (type echo is paused, and nobody knows until when)" in why
    assert run("why", waiting, "--json").document["reason"] == "paused"

    assert re.search(rf"^why it waits: +tower why {waiting}$", run("show", waiting).out, re.MULTILINE)

    undone = run("resume", "type", "echo")
    assert (undone.code, undone.out, undone.err) == (0, "", "There is no rule for type echo any more; tower rules lists those in force.\n")
    undone = run("limit", "tower", "--off")
    assert (undone.code, undone.err) == (0, "There is no rule for the tower any more; tower rules lists those in force.\n")
    assert run("limit", "key", "repo:acme/api", "--off").code == 0
    run("limit", "rate", "api:git hub", "--off")
    assert run("rules").out == ""
    assert run("limit", "queue", "defualt", "--max-running", "1").err.endswith("(queue_not_found)\n")


def test_keys_are_made_listed_and_revoked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key alone is on standard output, for a script to keep."""
    made = run("keys", "create", "ci", "--role", "operator", "--type", "echo", "--label", "team=a", "--expires-in", "90d")
    key = made.id
    assert re.fullmatch(r"twr_[0-9a-f]{10}_[\w-]{43}", key) and "told this once" in made.err
    monkeypatch.setenv("TOWER_KEY", key)
    assert re.search(r"limited to: +echo team=a", run("me").out)
    refused = run("enqueue", "sleep")
    assert (refused.code, "(key_limited)" in refused.err) == (1, True)
    assert run("keys", "list").err.endswith("(role_required)\n")
    monkeypatch.delenv("TOWER_KEY")
    assert re.search(rf"^{key[:14]}  ci    operator  echo team=a  .* until ", run("keys", "list").out, re.MULTILINE)
    assert key[15:] not in run("keys", "list", "--json").out
    assert run("keys", "revoke", key).out == f"The key {key[:14]} opens nothing any more.\n"
    assert " revoked " in run("keys", "list").out
    monkeypatch.setenv("TOWER_KEY", key)
    told = run("me")
    assert (told.code, "(key_revoked)" in told.err, key in told.err) == (1, True, False)
    monkeypatch.delenv("TOWER_KEY")
    assert "POST /access/keys" in run("audit").out
    assert run("audit", "--json", "--limit", "1").document["entries"][0]["action"] == f"DELETE /access/keys/{key[:14]}"
    assert run("keys", "create", "x", "--role", "viewer", "--expires-in", "soon").code == 2


def test_the_whole_tower_is_looked_at(run: Run) -> None:
    """Its task types, workers, queues and what is active; as tables and as JSON."""
    task_id = run("enqueue", "sleep", "--payload", '{"seconds": 30}').id
    wait_for("it to run", lambda: run("show", task_id, "--json").document["status"] == "running")
    assert re.search(r"^echo +default +60s +Return the payload", run("handlers").out, re.MULTILINE)
    assert "payload_schema" in run("handlers", "--json").document["handlers"][0]
    assert [worker["running"] for worker in run("workers", "--json").document["workers"]] == [1]
    assert re.search(r" +1 +8 +default ", run("workers").out)
    assert re.search(r"^default +[01] +0 +1 +open$", run("queues").out, re.MULTILINE)
    seen = run("watch", "--once")
    assert seen.out.startswith("ready: 8 slots of 1 worker\n")
    assert re.search(rf"^{task_id}  running +sleep", seen.out, re.MULTILINE)
    assert task_id in [task["id"] for task in run("watch", "--once", "--json").document["active"]]
    assert "\x1b" not in seen.out, "no colours, and nothing is cleared where there is no terminal"
    run("cancel", task_id)


def test_watching_goes_on_until_ctrl_c(run: Run, server: Processes) -> None:
    """One look below the other where there is no terminal."""
    watching = server.spawn(TOWER, "watch", "--every", "0.2", "--url", server.url, stdout=subprocess.PIPE)
    assert watching.stdout
    seen = 0
    while seen < 3:
        seen += watching.stdout.readline().startswith("ready:")
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=20)
    assert watching.returncode == 130


def test_ctrl_c_leaves_the_task_running_and_says_how_to_follow_it(run: Run, server: Processes) -> None:
    """Only the wait for it is over."""
    wait = ("enqueue", "sleep", "--payload", '{"seconds": 30}', "--wait", "--url", server.url)
    waiting = server.spawn(TOWER, *wait, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert waiting.stdout
    task_id = waiting.stdout.readline().strip()
    while "to go" not in waiting.stdout.readline():
        pass
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=20)
    assert waiting.returncode == 130
    assert (
        err.strip()
        == f"tower: Task {task_id} goes on. Follow it again with `tower logs -f {task_id}`, end it with `tower cancel {task_id}`."
    )
    assert run("show", task_id, "--json").document["status"] == "running"
    run("cancel", task_id)


def test_a_shell_completes_commands(run_local: Run) -> None:
    """By what `tower completion` prints."""
    assert "_TOWER_COMPLETE=bash_complete" in run_local("completion", "bash").out
    asked = {**os.environ, "_TOWER_COMPLETE": "bash_complete", "COMP_WORDS": "tower en", "COMP_CWORD": "1"}
    done = subprocess.run([Path(sys.executable).parent / "tower"], env=asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "plain,enqueue\n"


def test_the_page_is_opened_in_the_browser(run_local: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its address is printed, for where there is none."""
    opened = list[str]()
    monkeypatch.setattr(click, "launch", opened.append)
    monkeypatch.setenv("TOWER_URL", "http://127.0.0.1:9")
    assert run_local("open").out == "http://127.0.0.1:9/\n"
    assert run_local("open", "0192f0c1-2345-7abc-8def-0123456789ab").code == 0
    assert opened == ["http://127.0.0.1:9/", "http://127.0.0.1:9/ui/tasks/0192f0c1-2345-7abc-8def-0123456789ab"]


def _examples() -> list[str]:
    """Every line that docs/cli.md shows, and every example of a help text, that a running tower can answer."""
    shown = re.findall(r"^    (tower .+?)(?: +#.*)?$", (Path(__file__).parent.parent / "docs" / "cli.md").read_text(), re.MULTILINE)
    groups = [cli, *(command for command in _whole().values() if isinstance(command, click.Group))]
    helps = [command.epilog or "" for group in groups for command in group.commands.values()]
    lines = dict.fromkeys([*shown, *(text.removeprefix("Example: ") for text in helps)])
    others = ("up", "worker", "restore", "open")  # they start something, or take a tower that stands still
    return [line for line in lines if line.startswith("tower ") and line.split()[1] not in others]


@pytest.mark.parametrize("example", _examples())
def test_an_example_works_as_it_is_written(run: Run, server: Processes, monkeypatch: pytest.MonkeyPatch, example: str) -> None:
    """Of docs/cli.md and of the help texts, each on tasks that are as it means."""
    for name in ("DATABASE_URL", "TRACE_DIR"):
        monkeypatch.setenv(name, server.environment[name])
    Path("request.json").write_text(json.dumps({"url": f"{server.url}/health"}))
    known = "0192f0c1-2345-7abc-8def-0123456789ab"
    later = ["--not-before", "2500-01-01T00:00:00Z"] if " cancel " in example else ["--wait"]
    if known in example:
        task = run("enqueue", "echo", *later)
        example = example.replace(known, task.out.split()[0])
    if "twr_0123456789" in example:
        example = example.replace("twr_0123456789", run("keys", "create", "x", "--role", "viewer").out[:14])
    asked = shlex.split(example)[1:] + (["--once"] if " watch" in example else [])
    told = run(*asked)
    # What they wait for may fail, and differences may be found: here is no repository, and other tests leave things behind.
    assert told.code in ((0, 1) if "--wait" in asked or "fsck" in asked else (0,)), told.err
    if "pause" in asked:
        run("resume", *[word for word in asked[1:] if not word.startswith("-")][:2])
