"""Death at every moment that tasks share, embedded on SQLite; `python -m tests.chaos.nth` tries them all, for every type."""

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


@pytest.mark.parametrize(("type_", "first"), [("command", 1), ("echo", 2), ("sleep", 3), ("http", 4)])
def test_a_server_that_dies_anywhere_keeps_every_promise(struck: Lab, type_: str, first: int) -> None:
    """At each fourth point, from its migration to the last word of the trace; together they try those that all types share."""
    assert kill_at_every(struck, type_, SERVER, first=first, step=4) > 6
