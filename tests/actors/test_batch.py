"""Which tasks share a thread, and what becomes of those behind one that is slow."""

import time
from unittest.mock import Mock

from actors.batch import Batch, Tempo, Watch
from tests.servers import wait_for
from tower.leases import Claim
from tower.lifecycle import Outcome
from tower.models import new_id
from tower.terms import SUCCEEDED

_CLAIM = Claim("", 1, "token", "w1", "echo", "{}", 60.0, None, 1, 3, 0, 0.0)
_ENDED = Outcome(SUCCEEDED)


def _claims(*types: str) -> list[Claim]:
    return [_CLAIM._replace(id=new_id(), type=name) for name in types]


def _ids(batch: Batch) -> list[str]:
    return [claim.id for claim in iter(batch.next, None)]


def test_what_was_quick_lately_runs_together_and_all_else_alone() -> None:
    """A type that was never seen is not quick, and one slow time is remembered for a while."""
    tempo = Tempo()
    claims = _claims("echo", "new", "slow", "echo")
    for name, seconds in (("echo", 0.0001), ("slow", 1.0)):
        tempo.note(name, seconds)
    tempo.note("slow", 0.0001)
    found = [_ids(batch) for batch in tempo.batches(claims, 0.0)]
    assert found == [[claims[0].id, claims[3].id], [claims[1].id], [claims[2].id]]
    for _ in range(50):
        tempo.note("slow", 0.0001)
    assert len(tempo.batches(claims, 0.0)) == 2


def test_a_batch_is_split_around_the_task_under_way() -> None:
    """Those that have ended are recorded by others, and each slot goes with its task."""
    claims = _claims(*["echo"] * 4)
    batch = Batch(claims, 5.0)
    batch.next()
    batch.end(Mock(), _ENDED)
    batch.next()
    others = batch.split()
    assert (batch.slots, [other.slots for other in others], [other.leased_at for other in others]) == (1, [1, 1, 1], [5.0] * 3)
    assert [_ids(other) for other in others[:2]] == [[claims[2].id], [claims[3].id]]
    assert len(others[2].take_done()) == 1
    assert batch.next() is None
    batch.end(Mock(), _ENDED)
    assert len(batch.take_done()) == 1


def test_the_watch_takes_away_what_waits_behind_a_task() -> None:
    """Once, and it looks after nothing on which nobody depends."""
    begun: list[Batch] = []
    watch = Watch(begun.append)
    with watch.over(Batch(_claims("echo"), 0.0)):
        pass
    batch = Batch(_claims("echo", "echo"), 0.0)
    with watch.over(batch):
        batch.next()
        wait_for("the split", lambda: bool(begun))
    assert (len(begun), batch.slots) == (1, 1)


def test_a_batch_whose_tasks_are_all_quick_enough_is_split_too_when_it_takes_long() -> None:
    """Else the first of very many would be recorded with the last."""
    begun: list[Batch] = []
    watch = Watch(begun.append)
    batch = Batch(_claims(*["echo"] * 5000), 0.0)
    with watch.over(batch):
        while batch.next() and not begun:
            time.sleep(0.001)
    wait_for("the others to begin elsewhere", lambda: bool(begun))
