"""Imports go one way, and importing opens nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Lower may not import higher; names on one level may import each other only downwards in this order.
LEVELS = [
    ["tower", "tower.errors", "tower.faults", "tower.proc", "tower.terms"],
    ["tower.settings", "tower.keeper", "tower.masking", "tower.jsontext", "tower.host", "tower.group", "tower.errands"],
    ["tower.log", "tower.lifeline", "tower.folder"],
    ["tower.arrived", "tower.turns", "tower.trouble", "tower.sqlite", "tower.postgres"],
    ["tower.db"],
    ["tower.models"],
    ["tower.leases", "tower.reminders"],
    ["tower.moves"],
    ["tower.lifecycle", "tower.decision", "tower.estimate"],
    ["tower.load"],
    ["tower.spec"],
    ["tower.handler", "tower.broker", "tower.trace", "tower.queries", "tower.tree", "tower.due"],
    ["tower.audit", "tower.keys", "tower.overview"],
    ["tower.views"],
    ["tower.bulk", "tower.retention"],
    ["tower.sweep", "tower.fsck", "tower.rules", "tower.why", "tower.backup"],
    ["tower.orchestrator"],
    ["actors"],
    ["tower.api", "tower.ui", "tower.client"],
    ["tower.cli_options", "tower.cli_access", "tower.cli_backup", "tower.cli_fleet", "tower.cli_rules"],
    ["tower.main", "tower.actors", "tower.cli", "tower.cli_trace", "devops_control_tower"],
]
DOORS = {"tower.main", "tower.actors", "tower.cli", "tower.cli_trace"}
MODULES = sorted(path for folder in ("tower", "actors", "devops_control_tower") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level_of(module: str) -> int:
    found = [(len(prefix), level) for level, names in enumerate(LEVELS) for prefix in names if (module + ".").startswith(prefix + ".")]
    assert found, f"{module} has no level; give it one"
    return max(found)[1]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = {name_of(module) for module in MODULES}
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in names else str(node.module) for alias in node.names}
    return {module for module in found if module.partition(".")[0] in ("tower", "actors", "devops_control_tower")}


@pytest.mark.parametrize("path", [path for path in MODULES if "migrations" not in path.parts], ids=name_of)
def test_a_module_imports_only_from_below(path: Path) -> None:
    """And the control plane reaches actors by their names, except in its doors."""
    module = name_of(path)
    for imported in imports_of(path):
        assert level_of(imported) <= level_of(module), f"{module} imports {imported}, which stands above it"
        if module.startswith("tower") and module not in DOORS:
            assert not imported.startswith("actors"), f"{module} imports {imported}; send to the actor by its name instead"


def test_importing_opens_nothing() -> None:
    """No thread, no database, no broker: only the doors do that, when they are run."""
    names = [name_of(path) for path in MODULES if "migrations" not in path.parts and name_of(path) != "tower.actors"]
    code = f"""
import importlib, socket, sqlite3, threading
def refuse(*_, **__): raise AssertionError("an import opened something")
socket.socket.connect = refuse
sqlite3.connect = refuse
for name in {names!r}: importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
import dramatiq.broker
assert dramatiq.broker.global_broker is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_command_that_asks_a_tower_imports_no_more_than_that_takes() -> None:
    """The server, rows and brokers take half a second, for each command of a script."""
    code = """
import sys, tower.cli
heavy = {"dramatiq", "fastapi", "jinja2", "peewee", "psutil", "psycopg2", "redis", "starlette", "uvicorn"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_only_the_settings_read_the_environment() -> None:
    """One place to look for what can be set."""
    for path in MODULES:
        if name_of(path) != "tower.settings":
            text = path.read_text()
            assert "os.environ" not in text and "getenv" not in text, f"{path} reads the environment; add a setting instead"
