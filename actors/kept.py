"""What a worker will start next, as it keeps it in mind."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

#: How long a choice, or another start, waits for one that is under way: about as long as one takes, since that is most likely a decision
#: of its own.
_TURN_S = 0.05
#: Where tasks are that were entered: they have an index.
NOWHERE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Some:
    """Tasks that are about to start: the token of the decision that they build on, and the number of the choice that they are from."""

    ids: Sequence[str] = ()
    token: int = 0
    choice: int = 0
    #: Where those are that have only arrived; see `lifecycle.start`.
    places: Mapping[str, str] = field(default_factory=lambda: NOWHERE)


class Kept:
    """Tasks that a pass has chosen and that stay queued until slots are free; none starts once anybody else has decided.

    Who starts some has a turn, since each start is a decision and two cannot build on the same one. Whoever comes meanwhile waits for its
    end, but for no longer than a moment, since it may take as long as the database is away.
    """

    def __init__(self) -> None:
        self._ids = deque[str]()
        self._places = NOWHERE
        self._token = self._choice = 0
        self._is_turn = False
        #: How many choices wait for the end of a turn; they go before the starts that wait for it.
        self._choosing = 0
        self._change = threading.Condition()

    @property
    def count(self) -> int:
        """How many are left."""
        return len(self._ids)

    def put(self, ids: Sequence[str], token: int, places: Mapping[str, str] = NOWHERE) -> int:
        """Keep these in place of those that are left, once no turn is under way, or a moment later; return the number of this choice."""
        with self._change:
            self._choosing += 1
            self._change.wait_for(lambda: not self._is_turn, _TURN_S)
            self._choosing -= 1
            self._change.notify_all()
            self._ids, self._token, self._places, self._choice = deque(ids), token, places, self._choice + 1
            return self._choice

    def is_good(self, choice: int) -> bool:
        """Whether neither another choice has followed, nor a decision of somebody else was met."""
        return self._choice == choice

    def take(self, most: int) -> Some:
        """Begin a turn with the first of them, up to `end`; with none if there are none, or somebody's turn does not end.

        Who took none for a moment's turn of another would leave his slots idle until the next pass.
        """
        with self._change:
            if not most or not self._ids:
                return Some()
            is_free = self._change.wait_for(lambda: not (self._is_turn or self._choosing), _TURN_S)
            if not is_free or not self._ids:
                return Some()
            self._is_turn = True
            return Some([self._ids.popleft() for _ in range(min(most, len(self._ids)))], self._token, self._choice, self._places)

    def end(self, some: Some, token: int, *, is_good: bool) -> None:
        """End a turn: what is left builds on its decision, or, if nothing came of that since somebody else had decided, is dropped."""
        with self._change:
            self._is_turn = False
            self._change.notify_all()
            if some.choice != self._choice:
                return
            self._token = token
            if not is_good:
                self._ids.clear()
                self._choice += 1
