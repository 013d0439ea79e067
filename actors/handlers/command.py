"""command: runs a program."""

import re
import shutil
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from tower import jsontext
from tower.handler import SECRET, SECRET_NAME, Fail, TaskContext, handler


def _env_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("should be letters, digits and '_', as in PYTHONPATH")
    if name.startswith("TOWER_"):
        raise ValueError("names that start with TOWER_ are set by the tower itself; take another")
    return name


def _env_value(value: str) -> str:
    if value.startswith(SECRET) and not SECRET_NAME.fullmatch(value.removeprefix(SECRET)):
        raise ValueError("should name a secret by letters, digits and '_', as in secret://GITHUB_TOKEN")
    return value


class CommandPayload(BaseModel):
    """A program with its arguments; there is no shell in between."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"argv": ["git", "log", "--oneline", "-3"], "cwd": "/srv/app"}]}
    )

    argv: list[Annotated[str, StringConstraints(max_length=131_072)]] = Field(
        min_length=1, max_length=4096, description="The program and its arguments, one by one."
    )
    cwd: str | None = Field(None, min_length=1, max_length=4096, description="The folder to run in; the attempt's own if absent.")
    env: dict[Annotated[str, AfterValidator(_env_name)], Annotated[str, AfterValidator(_env_value)]] = Field(
        default_factory=dict,
        max_length=256,
        description="More environment variables; `secret://NAME` stands for a secret of the worker, which is hidden in all that is said.",
    )
    stdin: str | None = Field(None, description="What the program reads on its standard input.")
    artifacts: list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]] = Field(
        default_factory=list, max_length=100, description="Files to keep in the trace, relative to cwd; `*` and `**` match."
    )
    ok_exit_codes: list[int] = Field(default=[0], min_length=1, description="Exit codes that count as success.")


@handler("command", payload=CommandPayload)
def command(payload: CommandPayload, task: TaskContext) -> dict[str, Any]:
    """Run a program without a shell; its output goes to log.txt as it comes, its exit code into the result."""
    if not payload.argv[0]:
        raise Fail("command_not_found", "argv[0] is empty; put the program's name there.")
    given = {name: task.secret(value.removeprefix(SECRET)) if value.startswith(SECRET) else value for name, value in payload.env.items()}
    ended = task.run(payload.argv, cwd=payload.cwd, env={**given, **_told_of_before(task)}, stdin=payload.stdin)
    _keep(payload, task, must_exist=ended.exit_code in payload.ok_exit_codes)
    if ended.exit_code not in payload.ok_exit_codes:
        raise Fail("exit_nonzero", _say(payload.argv[0], ended.exit_code), exit_code=ended.exit_code, tail=ended.tail)
    return {"exit_code": ended.exit_code}


def _told_of_before(task: TaskContext) -> dict[str, str]:
    """Return what lets a program go on where the attempt before it broke off."""
    if task.previous is None:
        return {}
    return {"TOWER_PREVIOUS_ERROR": jsontext.dumps(task.previous.error), "TOWER_PREVIOUS_LOG": task.previous.log_tail}


def _say(program: str, exit_code: int) -> str:
    how = f"was ended by signal {-exit_code}" if exit_code < 0 else f"exited with code {exit_code}"
    return f"{Path(program).name} {how}."


def _keep(payload: CommandPayload, task: TaskContext, *, must_exist: bool) -> None:
    folder = Path(payload.cwd or task.folder).resolve()
    for pattern in payload.artifacts:
        found = [path for path in _matches(folder, pattern) if path.is_file() and path.resolve().is_relative_to(folder)]
        if not found and must_exist:
            raise Fail("artifact_missing", f"No file in {folder} matches {pattern!r}.")
        for path in found:
            shutil.copyfile(path, task.artifact(path.relative_to(folder).as_posix()))


def _matches(folder: Path, pattern: str) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise Fail("artifact_missing", f"{pattern!r} leaves cwd; name files below it.")
    # Before Python 3.13, a `**` at the end means folders alone.
    return sorted(folder.glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
