"""Rules: limits, rates and pauses that people set, and whoever decides what may start keeps."""

import difflib
import logging
from collections.abc import Callable, Iterable
from typing import Any

from tower import db, lifecycle
from tower.broker import ORCHESTRATE, Nudger
from tower.decision import QUEUE, RATE, TOWER, TYPE
from tower.errors import InvalidRule, NotFound
from tower.handler import Registry
from tower.models import Rule
from tower.spec import MAX_STARTS, MAX_WINDOW_S

MAX_RUNNING = 1_000_000
#: How long a client is kept waiting for a database that is away, before it is told to come back.
_PATIENCE_S = 5.0

_log = logging.getLogger(__name__)

RuleRow = dict[str, Any]


class Rules:
    """Sets rules, tells the process log who did, and nudges the orchestrator actor when something may start that could not."""

    def __init__(self, registry: Registry, nudger: Nudger) -> None:
        self._registry = registry
        self._nudger = nudger

    def set_limit(self, kind: str, name: str, *, max_running: int | None = None, rate: tuple[int, float] | None = None) -> RuleRow:
        """Limit how many tasks are in flight or, for a rate key, how often they start; return the rule.

        What was set before is replaced. Raises InvalidRule, and NotFound for an unknown queue or type.
        """
        self._known(kind, name)
        _check_limits(kind, max_running, rate)
        limit, per_s = rate or (None, None)
        return self._change("limit set", kind, name, {}, max_running=max_running, rate_limit=limit, rate_per_s=per_s)

    def lift_limit(self, kind: str, name: str) -> RuleRow:
        """Take the limit off again; a pause stays. Raises NotFound if there is none."""
        found = db.read(lambda: _find(kind, name))
        if found["max_running"] is None and found["rate_limit"] is None:
            raise NotFound(f"There is no limit on {_called(kind, name)}; GET /rules lists them.", code="rule_not_found")
        return self._change("limit lifted", kind, name, {}, max_running=None, rate_limit=None, rate_per_s=None)

    def pause(self, kind: str, name: str, by: str | None = None, reason: str | None = None) -> RuleRow:
        """Start nothing of it until it is resumed; what was handed to the workers goes on. Raises NotFound for an unknown queue or type."""
        self._known(kind, name)
        told = {"by": by, "reason": reason}
        return self._change("paused", kind, name, told, paused_at=db.now(), paused_by=by, reason=reason)

    def resume(self, kind: str, name: str, by: str | None = None) -> RuleRow:
        """Let it start again; nothing happens if it was not paused. Raises NotFound for an unknown queue or type."""
        self._known(kind, name)
        return self._change("resumed", kind, name, {"by": by}, paused_at=None, paused_by=None, reason=None)

    def _change(self, what: str, kind: str, name: str, told: dict[str, Any], **changes: Any) -> RuleRow:
        def work() -> RuleRow:
            values = {"kind": kind, "name": name, "updated_at": db.now(), **changes}
            written = {getattr(Rule, field): value for field, value in values.items() if field not in ("kind", "name")}
            Rule.insert(**values).on_conflict(conflict_target=[Rule.kind, Rule.name], update=written).execute()
            lifecycle.void_decisions()
            row = _find(kind, name)
            Rule.delete().where(Rule.kind == kind, Rule.name == name, *(column.is_null() for column in _SAYS)).execute()
            return row

        row = db.unit(work, patience_s=_PATIENCE_S)
        limits = {name: row[name] for name in ("max_running", "rate_limit", "rate_per_s")} if "limit" in what else {}
        facts = {"kind": kind, "name": name, **limits, **told}
        _log.info("%s", what, extra={"fields": {key: value for key, value in facts.items() if value is not None}})
        self._nudger.send(ORCHESTRATE, "")
        return row

    def _known(self, kind: str, name: str) -> None:
        """Raise NotFound with the nearest name for a queue or type that no handler has and no rule is for."""
        names: dict[str, Callable[[], Iterable[str]]] = {
            QUEUE: lambda: self._registry.queues,
            TYPE: lambda: [made.name for made in self._registry],
        }
        known = list(names[kind]()) if kind in names else [name]
        if name in known or any((row["kind"], row["name"]) == (kind, name) for row in db.read(listed, patience_s=_PATIENCE_S)):
            return
        near = difflib.get_close_matches(name, known, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise NotFound(f"There is no {kind} {name!r}.{guess} Known: {', '.join(known) or 'none'}.", code=f"{kind}_not_found")


_SAYS = (Rule.max_running, Rule.rate_limit, Rule.paused_at)


def listed() -> list[RuleRow]:
    """Return every rule, by kind and name. Runs inside `db.read`."""
    return [dict(row) for row in Rule.select().order_by(Rule.kind, Rule.name).dicts()]


def _find(kind: str, name: str) -> RuleRow:
    row = Rule.select().where(Rule.kind == kind, Rule.name == name).dicts().first()
    if row is None:
        raise NotFound(f"There is no rule for {_called(kind, name)}; GET /rules lists them.", code="rule_not_found")
    return dict(row)


def _called(kind: str, name: str) -> str:
    return "the tower" if kind == TOWER else f"{'rate key' if kind == RATE else kind} {name!r}"


def _check_limits(kind: str, max_running: int | None, rate: tuple[int, float] | None) -> None:
    """Raise InvalidRule for a limit that this kind does not have, or that no number of tasks can keep."""
    if kind == RATE:
        if rate is None or max_running is not None:
            raise InvalidRule("A rate key takes a rate, as in 10 starts per 60 s, and no max_running.", code="invalid_rule", field="rate")
        if not (1 <= rate[0] <= MAX_STARTS and 0 < rate[1] <= MAX_WINDOW_S):
            said = f"A rate is 1 to {MAX_STARTS} starts within at most {MAX_WINDOW_S:g} seconds, got {rate[0]} per {rate[1]:g} s."
            raise InvalidRule(said, code="invalid_rule", field="rate")
        return
    if rate is not None:
        raise InvalidRule(f"A rate is set on a rate key, not on a {kind}: use the kind 'rate'.", code="invalid_rule", field="rate")
    if max_running is None or not 1 <= max_running <= MAX_RUNNING:
        cure = f"To start nothing of {'a ' if kind != TOWER else 'the '}{kind}, pause it."
        said = f"max_running is 1 to {MAX_RUNNING}, got {max_running}. {cure}"
        raise InvalidRule(said, code="invalid_rule", field="max_running")
