"""Death at some moments of a task, as services on Postgres; `python -m tests.chaos.nth --backend postgres` tries them all."""

from collections.abc import Iterator

import pytest

from tests.chaos.lab import Lab, lab
from tests.chaos.lives import SERVER, WORKER
from tests.chaos.nth import kill_at_every

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab(tmp_path_factory.mktemp("nth"), "postgres") as made:
        yield made


def test_a_worker_that_dies_at_some_point_of_a_command_keeps_every_promise(struck: Lab) -> None:
    """Another one takes over what it had, whether it had claimed, run, ended or told it."""
    assert kill_at_every(struck, "command", WORKER, first=2, step=4) > 6


def test_a_server_that_dies_at_some_point_of_a_task_keeps_every_promise(struck: Lab) -> None:
    """It only takes tasks in."""
    assert kill_at_every(struck, "echo", SERVER, step=2) > 2
