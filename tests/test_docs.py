"""What the docs say is true."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from fastapi.testclient import TestClient

from tests.conftest import BASE, LOCAL, Tower
from tower.api.answers import WaitReason
from tower.errors import FAILURES
from tower.main import build
from tower.moves import ARROWS
from tower.settings import Settings, env_name

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_every_setting_is_in_the_table_as_it_is() -> None:
    """Name, default and meaning; and nothing that is not a setting."""
    rows = [line for line in (DOCS / "settings.md").read_text().splitlines() if line.startswith("| `")]
    expected = []
    for name, field in Settings.model_fields.items():
        shown = "" if field.default is None or field.default == () else str(field.default)
        expected.append(f"| `{env_name(name)}` | {f'`{shown}`' if shown else 'unset'} | {field.description} |")
    assert rows == expected


def test_the_arrows_of_the_states_are_those_of_the_code() -> None:
    """The table in docs/architecture.md."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    assert {status: tuple(re.findall(r"`(\w+)`", then)) for status, then in rows} == ARROWS


def test_every_failure_code_is_explained() -> None:
    """The table in docs/architecture.md has the same sentences as the code."""
    text = (DOCS / "architecture.md").read_text()
    for code, advice in FAILURES.items():
        assert f"| `{code}` | {advice} |" in text


def test_every_wait_reason_is_explained() -> None:
    """The table in docs/architecture.md has those of the API and no other."""
    order = (DOCS / "architecture.md").read_text().partition("## Order")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| [^|]+ \|$", order, re.MULTILINE)
    assert [reason for row in rows for reason in re.findall(r"`(\w+)`", row)] == list(get_args(WaitReason))


@pytest.fixture
def documented_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The handler of docs/handlers.md, as a module."""
    from tower.handler import registry

    (tmp_path / "documented_handler.py").write_text(blocks(DOCS / "handlers.md", "python")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("documented_handler")
    yield
    del registry._types["count_lines"], sys.modules["documented_handler"]


@pytest.mark.usefixtures("documented_handler")
def test_the_documented_handler_passes_its_documented_test(sqlite_settings: Settings, tmp_path: Path) -> None:
    """Both listings of docs/handlers.md, run as they stand."""
    names: dict[str, object] = {}
    exec(blocks(DOCS / "handlers.md", "python")[1], names)
    (documented,) = (value for name, value in names.items() if name.startswith("test_"))
    with TestClient(build(sqlite_settings), base_url=BASE, client=LOCAL) as client:
        documented(Tower(client, sqlite_settings), tmp_path)  # type: ignore[operator]


def test_every_type_that_ships_is_in_the_readme() -> None:
    """And every route of its examples exists."""
    from actors.handlers import load

    readme = (ROOT / "README.md").read_text()
    assert all(f"`{kind.name}`" in readme for kind in load())


def test_the_readme_is_short() -> None:
    """Longer things go to docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_every_link_leads_somewhere() -> None:
    """Between the documents of the project."""
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_scripts_are_plain_sh() -> None:
    """No bash, no make: `sh -n` takes them."""
    for script in [*(ROOT / "bin").iterdir(), ROOT / ".ci" / "run"]:
        assert script.read_text().startswith("#!/bin/sh\n")
        subprocess.run(["sh", "-n", script], check=True)
