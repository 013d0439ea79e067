"""Death at every other moment of a task, embedded on SQLite; `python -m tests.chaos.nth` tries them all, for every type."""

from collections.abc import Iterator

import pytest

from tests.chaos.lab import Lab, lab
from tests.chaos.lives import SERVER
from tests.chaos.nth import kill_at_every

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("nth"), "sqlite") as made:
        yield made


def test_a_server_that_dies_at_some_point_of_a_command_keeps_every_promise(struck: Lab) -> None:
    """At each second point, from its migration to the last word of the trace."""
    assert kill_at_every(struck, "command", SERVER, step=2) > 10


@pytest.mark.parametrize(("type_", "first"), [("echo", 2), ("sleep", 4), ("http", 6)])
def test_a_server_that_dies_anywhere_keeps_every_promise(struck: Lab, type_: str, first: int) -> None:
    """At each fourth point; together they try them all, since all types share most."""
    assert kill_at_every(struck, type_, SERVER, first=first, step=4) > 6
