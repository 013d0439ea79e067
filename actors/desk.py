"""The desk of a worker: there ends are recorded and tasks are claimed, by one commit for all slots that come at the same time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from actors.kept import NOWHERE, Kept, Some
from actors.worker import WorkerProcess
from tower import db, lifecycle
from tower.faults import fault
from tower.group import Group
from tower.host import lease_time
from tower.leases import Claim
from tower.lifecycle import Ending
from tower.models import new_id, new_token
from tower.settings import Settings


@dataclass(frozen=True)
class Answer:
    """The status that each attempt ended with, None if its lease was gone; and the next claims, with when they were asked for."""

    statuses: Sequence[str | None] = ()
    claims: Sequence[Claim] = ()
    leased_at: float = 0.0


@dataclass(frozen=True)
class _Round:
    """What a thread has to write: how attempts ended, and how many tasks it takes next."""

    endings: Sequence[Ending] = ()
    takes: int = 0


class Desk:
    """Records how attempts ended, and claims what slots run next: first what a pass has left here, then what was dispatched."""

    def __init__(self, settings: Settings, worker: WorkerProcess, is_quick: Callable[[str], bool]) -> None:
        self._settings = settings
        self._worker = worker
        self._is_quick = is_quick
        self._group = Group(self._write)
        self._kept = Kept()
        #: Whether more was dispatched than slots were free.
        self.is_behind = False

    @property
    def has_more(self) -> bool:
        """Whether something most likely waits for the next slot: then an end is recorded together with the next claim."""
        return self.is_behind or self.kept > 0

    @property
    def kept(self) -> int:
        """How many tasks are kept for slots that become free."""
        return self._kept.count

    def keep(self, ids: Sequence[str], token: int, places: Mapping[str, str] = NOWHERE) -> int:
        """Keep what the decision of this token has chosen, in place of what is kept; return the number of this choice.

        `places` tells where those are that have only arrived.
        Never waits for the database: who beats must not depend on a write that cannot be done.
        """
        return self._kept.put(ids, token, places)

    def holds(self, choice: int) -> bool:
        """Whether this is still the last choice, as far as it is known here."""
        return self._kept.is_good(choice)

    def record(self, endings: Sequence[Ending], takes: int = 0) -> Answer:
        """Record ends and claim so many tasks at most, together with others who come at this moment."""
        return self._group.do(_Round(endings, takes))

    def claim(self, most: int) -> Answer:
        """Claim so many tasks at most."""
        return self._write([_Round(takes=most)])[0]

    def _write(self, rounds: Sequence[_Round]) -> list[Answer]:
        endings = [ending for one in rounds for ending in one.endings]
        takes = sum(one.takes for one in rounds)
        chosen, decided, claims = self._kept.take(takes), new_token(), list[Claim]()
        try:
            statuses, claims, sent = self._written(endings, takes, chosen, decided)
        finally:
            if chosen.ids:
                self._kept.end(chosen, decided, is_good=any(claim.id in chosen.ids for claim in claims))
        ended, taken = iter(statuses), iter(claims)
        return [Answer(list(islice(ended, len(one.endings))), list(islice(taken, one.takes)), sent) for one in rounds]

    def _written(self, endings: Sequence[Ending], takes: int, chosen: Some, decided: int) -> tuple[list[str | None], list[Claim], float]:
        """Record ends and claim tasks, those chosen first, in one transaction."""
        token, sent = new_id(), 0.0
        was_behind = has_caught_up = False

        def work() -> tuple[list[str | None], list[Claim]]:
            nonlocal sent, has_caught_up
            sent = lease_time(embedded=self._settings.embedded)  # anew for each try: they may be minutes apart
            statuses = lifecycle.finish_all(endings)
            claims = lifecycle.start(chosen.ids, chosen.token, self._worker.id, token, decided, chosen.places) if chosen.ids else []
            left = takes - len(claims)
            if left and (was_behind or not claims):
                claims += lifecycle.claim_some(self._worker.id, token, left, self._worker.queues)
                has_caught_up = len(claims) < takes  # all that was dispatched has been claimed
            return statuses, claims

        def recognise() -> tuple[list[str | None], list[Claim]] | None:
            statuses = [lifecycle.finished(ending.claim.id, ending.token) for ending in endings]
            claims = lifecycle.claimed(token)
            return (statuses, claims) if claims or any(statuses) else None

        if endings:
            fault("finish.before")
        if takes:
            fault("claim.before")
            was_behind, self.is_behind = self.is_behind, False  # before we look: who finds no slot after that says so again
        try:
            statuses, claims = db.unit(
                work,
                patience_s=self._settings.lease_s,
                recognise=recognise,
                is_one_statement=lifecycle.is_one_write(endings, takes),
                is_promise=self._is_promise,
                insists=lambda: bool(endings) and self._worker.is_cut_off(),
                sees_arrived=False,
            )
        except BaseException:
            has_caught_up = False
            raise
        finally:
            self.is_behind = self.is_behind or (was_behind and not has_caught_up)
        if endings:
            fault("finish.after_commit")
        if claims:
            fault("claim.after_commit")
        return statuses, claims, sent

    def _is_promise(self, written: tuple[list[str | None], list[Claim]]) -> bool:
        """Whether a power cut may not undo this: an end, or a beginning that counts. The next beat keeps all others."""
        statuses, claims = written
        return bool(statuses) or not all(claim.max_losses > 1 and self._is_quick(claim.type) for claim in claims)
