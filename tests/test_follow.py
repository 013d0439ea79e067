"""Following tasks together."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import rows as r
from tower import db, leases, lifecycle, queries
from tower.api import traces
from tower.api.follow import Watch
from tower.lifecycle import Outcome
from tower.settings import Settings
from tower.terms import SUCCEEDED

pytestmark = pytest.mark.usefixtures("rows")


async def _said(lines: AsyncIterator[bytes]) -> str:
    return b"".join([line async for line in lines]).decode()


def test_a_crowd_of_followers_costs_no_more_than_one(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One look asks for all tasks, and one reading serves all who are as far; each is told everything."""
    claims = [r.running() for _ in range(3)]
    looks, readings, progress, entries = list[int](), list[str](), queries.progress_of, queries.log_entries

    def look(ids: list[str]) -> Any:
        looks.append(len(ids))
        return progress(ids)

    def read(task_id: str, after: int, limit: int) -> Any:
        readings.append(task_id)
        return entries(task_id, after, limit)

    monkeypatch.setattr(queries, "progress_of", look)
    monkeypatch.setattr(queries, "log_entries", read)
    monkeypatch.setattr("tower.api.follow._LOOK_S", 0.02)

    async def follow() -> list[str]:
        watch = Watch()
        at = db.read(lambda: progress([claim.id for claim in claims]))
        crowd = [
            asyncio.create_task(_said(traces._follow(watch, claim.id, *at[claim.id], 0)))  # type: ignore[arg-type]
            for claim in claims
            for _ in range(40)
        ]
        await asyncio.sleep(0.1)
        for claim in claims:
            await asyncio.to_thread(db.unit, lambda claim=claim: leases.append_log(claim, 0, f"half way {claim.id}\n"))
        await asyncio.sleep(0.1)
        for claim in claims:
            await asyncio.to_thread(db.unit, lambda claim=claim: lifecycle.finish(claim, Outcome(SUCCEEDED, result="{}"), "t"))
        return await asyncio.gather(*crowd)

    said = asyncio.run(follow())
    for number, text in enumerate(said):
        assert f"half way {claims[number // 40].id}" in text
        assert text.count("event: end") == 1
    assert looks[0] == max(looks) == 3
    assert len(readings) <= 3 * 4


def test_a_look_that_fails_is_followed_by_another(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever went wrong: the followers of every task depend on it."""
    claim, progress, failures = r.running(), queries.progress_of, iter([RuntimeError("once"), None])

    def look(ids: list[str]) -> Any:
        error = next(failures, None)
        if error:
            raise error
        return progress(ids)

    monkeypatch.setattr(queries, "progress_of", look)
    monkeypatch.setattr("tower.api.follow._LOOK_S", 0.02)

    async def follow() -> str:
        watch = Watch()
        following = asyncio.create_task(_said(traces._follow(watch, claim.id, "running", 3, 0)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(db.unit, lambda: lifecycle.finish(claim, Outcome(SUCCEEDED, result="{}"), "t"))
        return await asyncio.wait_for(following, 20)

    assert "event: end" in asyncio.run(follow())


def test_who_follows_a_task_that_is_deleted_is_let_go(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to wait for."""
    monkeypatch.setattr("tower.api.follow._LOOK_S", 0.02)
    task_id = r.insert()

    async def follow() -> str:
        watch = Watch()
        following = asyncio.create_task(_said(traces._follow(watch, task_id, "queued", 1, 0)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(db.unit, lambda: db.rows("DELETE FROM task WHERE id = ?", [task_id]))
        return await asyncio.wait_for(following, 20)

    assert "event: end" not in asyncio.run(follow())
