"""command: real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import Tower
from tests.processes import marked
from tests.servers import wait_for
from tower import faults


def run(tower: Tower, *argv: str, **more: object) -> dict[str, object]:
    """Run a program to its end and its trace."""
    task = tower.wait(tower.enqueue("command", {"argv": list(argv), **more}), seconds=40)
    tower.traced(str(task["id"]))
    return task


def test_a_program_runs_and_its_output_and_exit_code_are_kept(tower: Tower, tmp_path: Path) -> None:
    """The README's example of real work: no shell, no network."""
    (tmp_path / "module.py").write_text("x = 1\n")
    task = run(tower, sys.executable, "-m", "compileall", ".", cwd=str(tmp_path))
    assert (task["status"], task["result"]) == ("succeeded", {"exit_code": 0})
    folder = tower.traced(str(task["id"]))
    assert "Compiling './module.py'" in (folder / "log.txt").read_text()
    assert json.loads((folder / "output.json").read_text())["result"] == {"exit_code": 0}


def test_a_failing_program_says_its_code_and_last_lines(tower: Tower) -> None:
    """exit_nonzero."""
    task = run(tower, "sh", "-c", "echo out; echo err >&2; exit 3")
    error = dict(task["error"])  # type: ignore[call-overload]
    assert (task["status"], error["code"], error["details"]) == ("failed", "exit_nonzero", {"exit_code": 3, "tail": "out\nerr"})
    assert "exit_nonzero" not in str(error["advice"])


def test_a_program_that_does_not_exist_is_named(sqlite_tower: Tower) -> None:
    """Told apart from a folder that does not exist."""
    assert run(sqlite_tower, "no-such-program")["error"]["code"] == "command_not_found"  # type: ignore[index]
    assert run(sqlite_tower, "true", cwd="/no/such/folder")["error"]["code"] == "command_not_started"  # type: ignore[index]


def test_a_program_that_cannot_be_run_says_why(sqlite_tower: Tower, tmp_path: Path) -> None:
    """It is there, but no program, or one whose interpreter is missing; a program's own 127 is its exit code."""
    (tmp_path / "text").write_text("just text")
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    for name, why in (("./text", "Permission denied"), ("./script", "not found")):
        error = dict(run(sqlite_tower, name, cwd=str(tmp_path))["error"])  # type: ignore[call-overload]
        assert (error["code"], error["message"]) == ("command_not_started", f"'{name}' could not be started: {why}.")
    error = dict(run(sqlite_tower, "sh", "-c", "no-such-program")["error"])  # type: ignore[call-overload]
    assert (error["code"], error["details"]["exit_code"]) == ("exit_nonzero", 127)


def test_a_program_is_looked_for_where_it_will_run(sqlite_tower: Tower, tmp_path: Path) -> None:
    """By the payload's PATH, relative to its cwd; also one whose name looks like an option."""
    (tmp_path / "bin").mkdir()
    for name in ("tool", "-tool"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho {name} was given $1\n")
        (tmp_path / "bin" / name).chmod(0o755)
        task = run(sqlite_tower, name, "two  words", cwd=str(tmp_path), env={"PATH": "bin:/usr/bin:/bin"})
        assert task["status"] == "succeeded", task["error"]
        assert f"] {name} was given two" in sqlite_tower.log(str(task["id"]))


def test_a_program_finds_nothing_open_but_its_own(sqlite_tower: Tower) -> None:
    """Standard input, output and error: neither the gate nor anything of the tower's."""
    code = "import os, stat; print('open:', os.listdir('/dev/fd')[:-1], 'file:', stat.S_ISREG(os.fstat(0).st_mode))"
    task = run(sqlite_tower, sys.executable, "-c", code, stdin="x")
    assert "open: ['0', '1', '2'] file: True" in sqlite_tower.log(str(task["id"]))


@pytest.mark.parametrize("point", ["spawn.before", "spawn.gate"])
def test_a_command_whose_gate_stays_shut_never_runs(sqlite_tower: Tower, tmp_path: Path, point: str) -> None:
    """Whatever goes wrong between its start and the word to its guardian."""
    faults.arm(f"{point}:1:sleep=0.2,{point}:1:raise")
    task = run(sqlite_tower, "touch", str(tmp_path / "ran"))
    faults.arm(None)
    assert dict(task["error"])["code"] == "handler_error"  # type: ignore[call-overload]
    assert not (tmp_path / "ran").exists()
    assert marked(str(task["id"])) == []


def test_stdin_env_and_own_exit_codes(sqlite_tower: Tower) -> None:
    """What the payload gives arrives, and the task's name and attempt with it."""
    code = "import os,sys; print(sys.stdin.read(), os.environ['COLOUR'], os.environ['TOWER_ATTEMPT']); sys.exit(7)"
    task = run(sqlite_tower, sys.executable, "-c", code, stdin="héllo", env={"COLOUR": "red"}, ok_exit_codes=[0, 7])
    assert task["result"] == {"exit_code": 7}
    assert "héllo red 1" in sqlite_tower.log(str(task["id"]))


def test_the_towers_own_secrets_do_not_reach_a_program(sqlite_tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither DATABASE_URL nor anything of TOWER_ but its name; nor the tower's own port, which a program would take for its own."""
    monkeypatch.setenv("PORT", "8000")
    monkeypatch.setenv("DATABASE_URL", "postgres://u:hunter2@h/d")
    monkeypatch.setenv("TOWER_SECRET", "hunter2")
    task = run(sqlite_tower, "env")
    log = sqlite_tower.log(str(task["id"]))
    assert "hunter2" not in log
    assert "PORT=8000" not in log


@pytest.mark.slow
def test_a_python_program_is_heard_while_it_runs(sqlite_tower: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is not kept back until its end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    task_id = sqlite_tower.enqueue("command", {"argv": [sys.executable, "-c", "import time; print('early'); time.sleep(300)"]})
    wait_for("the word", lambda: "] early" in sqlite_tower.log(task_id))
    sqlite_tower.client.post(f"/tasks/{task_id}/cancel")
    assert sqlite_tower.wait(task_id)["status"] == "cancelled"


def test_files_are_kept_by_name_and_pattern(sqlite_tower: Tower, tmp_path: Path) -> None:
    """Relative to cwd; one that is missing fails a command that succeeded."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.xml").write_text("<a/>")
    task = run(sqlite_tower, "true", cwd=str(tmp_path), artifacts=["out/*.xml"])
    assert (sqlite_tower.traced(str(task["id"])) / "artifacts/out/a.xml").read_text() == "<a/>"
    (tmp_path / "out/deep").mkdir()
    (tmp_path / "out/deep/b.txt").write_text("b")
    task = run(sqlite_tower, "true", cwd=str(tmp_path), artifacts=["out/**"])
    assert (sqlite_tower.traced(str(task["id"])) / "artifacts/out/deep/b.txt").read_text() == "b"
    assert run(sqlite_tower, "true", cwd=str(tmp_path), artifacts=["none.txt"])["error"]["code"] == "artifact_missing"  # type: ignore[index]
    assert run(sqlite_tower, "true", cwd=str(tmp_path), artifacts=["../x"])["error"]["code"] == "artifact_missing"  # type: ignore[index]


def test_a_symbolic_link_out_of_cwd_is_not_kept(sqlite_tower: Tower, tmp_path: Path) -> None:
    """Only what lies below cwd."""
    (tmp_path / "secret").symlink_to("/etc/passwd")
    assert run(sqlite_tower, "true", cwd=str(tmp_path), artifacts=["secret"])["error"]["code"] == "artifact_missing"  # type: ignore[index]


def test_a_gigantic_line_is_cut_into_pieces(tower: Tower) -> None:
    """Bounded memory, nothing lost up to the limit."""
    task = run(tower, sys.executable, "-c", "import sys; sys.stdout.write('x' * 3_000_000)")
    assert task["status"] == "succeeded"
    text = (tower.traced(str(task["id"])) / "log.txt").read_text()
    assert text.count("x") == 3_000_000
    assert max(map(len, text.split("\n"))) < 20_000


def test_bytes_that_are_not_text_are_shown_as_such(sqlite_tower: Tower) -> None:
    """No output can break the log."""
    task = run(sqlite_tower, sys.executable, "-c", r"import sys; sys.stdout.buffer.write(b'\xff\x00\xc3\xa9\r\nend')")
    assert sqlite_tower.log(str(task["id"])).count("��é") == 1


FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "300"])
subprocess.Popen(["sleep", "300"], start_new_session=True)
print("ready", flush=True)
time.sleep(300)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cancel", "timeout"])
def test_the_whole_process_tree_ends_with_the_attempt(tower: Tower, way: str) -> None:
    """P5: also a program that ignores SIGTERM, its child, and one that left the group."""
    timeout_s = 2 if way == "timeout" else 100
    task_id = tower.enqueue("command", {"argv": [sys.executable, "-c", FAMILY]}, timeout_s=timeout_s)
    wait_for("the family", lambda: len(marked(task_id)) == 3)
    if way == "cancel":
        tower.client.post(f"/tasks/{task_id}/cancel")
    task = tower.wait(task_id, seconds=15)
    assert task["status"] == {"cancel": "cancelled", "timeout": "timed_out"}[way]
    assert marked(task_id) == []


@pytest.mark.slow
def test_a_program_that_obeys_is_gone_at_once(tower: Tower) -> None:
    """Cancel takes a heartbeat, not the five seconds of one that ignores it."""
    task_id = tower.enqueue("command", {"argv": ["sleep", "300"]})
    wait_for("the process", lambda: len(marked(task_id)) == 1)
    tower.client.post(f"/tasks/{task_id}/cancel")
    assert tower.wait(task_id, seconds=4)["status"] == "cancelled"
    assert marked(task_id) == []


@pytest.mark.slow
def test_what_a_program_leaves_behind_is_ended(sqlite_tower: Tower) -> None:
    """A daemon does not outlive its lease."""
    task = run(sqlite_tower, "sh", "-c", "sleep 300 & setsid sleep 300 & echo started")
    assert task["status"] == "succeeded"
    assert marked(str(task["id"])) == []


def test_a_program_that_is_killed_says_by_which_signal(sqlite_tower: Tower) -> None:
    """Minus its number is the exit code."""
    task_id = sqlite_tower.enqueue("command", {"argv": ["sleep", "300"]})
    wait_for("the process", lambda: len(marked(task_id)) == 1)
    os.kill(marked(task_id)[0], signal.SIGKILL)
    error = sqlite_tower.wait(task_id)["error"]
    assert (error["details"]["exit_code"], error["message"]) == (-9, "sleep was ended by signal 9.")


@pytest.mark.slow
def test_what_a_program_says_on_its_way_out_is_heard(sqlite_tower: Tower) -> None:
    """It is read on while it obeys, however much it says."""
    script = "\n".join(
        [
            "import signal, sys, time",
            "def bye(*_):",
            "    print('x' * 300_000)",
            "    print('tidied')",
            "    sys.exit(0)",
            "signal.signal(signal.SIGTERM, bye)",
            "print('up', flush=True)",
            "time.sleep(300)",
        ]
    )
    task_id = sqlite_tower.enqueue("command", {"argv": [sys.executable, "-c", script]})
    wait_for("the program", lambda: "] up" in sqlite_tower.log(task_id))
    sqlite_tower.client.post(f"/tasks/{task_id}/cancel")
    assert sqlite_tower.wait(task_id, seconds=4)["status"] == "cancelled"
    sqlite_tower.traced(task_id)
    assert "] tidied" in sqlite_tower.log(task_id)


def test_no_process_of_ours_is_a_zombie(sqlite_tower: Tower) -> None:
    """Every child is waited for."""
    for _ in range(3):
        run(sqlite_tower, "true")
    here = psutil.Process()
    assert [child for child in here.children() if child.status() == psutil.STATUS_ZOMBIE and child.name() == "true"] == []
    assert subprocess.run(["true"], check=True).returncode == 0
