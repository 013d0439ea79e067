"""What the command line prints for people: short aligned text in which nothing a task wrote can act on the terminal."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tower.terms import DISPATCHED, QUEUED, RUNNING

_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
#: Control characters, halves of surrogate pairs, and what turns the direction of text.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_RESET = "\x1b[0m"

_FACTS = ("id", "type", "title", "requested_by", "queue", "concurrency_key", "parent_id", "correlation_id", "retry_of")
_TIMES = ("not_before", "expires_at", "created_at", "started_at", "finished_at")


def plain(text: Any) -> str:
    """Return the text on one line, with everything that could act on a terminal made visible."""
    return _ACTING.sub("\ufffd", str(text))


def log_line(line: str) -> str:
    """Return a line of a log with its colours kept inside the line, and nothing else that acts on a terminal but tabs."""
    parts = _COLOUR.split(line)
    safe = "".join(part if place % 2 else "\t".join(map(plain, part.split("\t"))) for place, part in enumerate(parts))
    return safe + _RESET if len(parts) > 1 else safe


def document(value: Any) -> str:
    """Return a value as JSON that is safe in any terminal and any encoding."""
    return json.dumps(value, indent=2)


def json_line(value: Any) -> str:
    """Return a value as JSON on one line."""
    return json.dumps(value)


def settings(values: dict[str, Any]) -> str:
    """Return settings as aligned lines, as the environment would hold them."""
    return table((name, _setting(value)) for name, value in values.items())


def task(found: dict[str, Any]) -> str:
    """Return a task as aligned lines, without what it does not have."""
    facts = [(name, found[name]) for name in _FACTS]
    facts[2:2] = [("status", _state(found)), ("attempt", _attempt(found))]
    facts += [("labels", " ".join(f"{name}={value}" for name, value in found["labels"].items()))]
    facts += [(name, found[name]) for name in _TIMES]
    if found["status"] in (QUEUED, DISPATCHED):
        facts.append(("why it waits", f"tower why {found['id']}"))
    lines = pairs((name, value) for name, value in facts if value)
    return "\n".join([lines, *_error_lines(found), *_values(found)])


def tasks(found: Sequence[dict[str, Any]]) -> str:
    """Return tasks as a table."""
    rows = [("ID", "STATUS", "TYPE", "CREATED", "TITLE")]
    rows += [(one["id"], _state(one), one["type"], _second(one["created_at"]), one["title"] or "") for one in found]
    return table(rows)


def rules(found: Sequence[dict[str, Any]]) -> str:
    """Return rules as a table."""
    rows = [("KIND", "NAME", "MAX RUNNING", "RATE", "PAUSED", "REASON")]
    for one in found:
        rate = f"{one['rate']['limit']}/{one['rate']['per_s']:g}s" if one["rate"] else ""
        paused = " by ".join(filter(None, (_second(one["paused_at"]), one["paused_by"]))) if one["paused_at"] else ""
        rows.append((one["kind"], one["name"], str(one["max_running"] or ""), rate, paused, one["reason"] or ""))
    return table(rows)


def keys(found: Sequence[dict[str, Any]]) -> str:
    """Return keys as a table."""
    rows = [("KEY", "NAME", "ROLE", "LIMITED TO", "CREATED", "USED", "STATE")]
    for one in found:
        limits = " ".join([*one["types"], *(f"{name}={value}" for name, value in one["labels"].items())])
        ends = f"until {_second(one['expires_at'])}" if one["expires_at"] else "open"
        state = f"revoked {_second(one['revoked_at'])}" if one["revoked_at"] else ends
        used = _second(one["used_at"]) if one["used_at"] else "never"
        rows.append((one["id"], one["name"], one["role"], limits, _second(one["created_at"]), used, state))
    return table(rows)


def audit(found: Sequence[dict[str, Any]]) -> str:
    """Return the record of who did what as a table."""
    rows = [("AT", "WHO", "FROM", "WHAT", "")]
    rows += [(_second(one["at"]), one["actor"], one["address"] or "", one["action"], one["target"]) for one in found]
    return table(rows)


def handlers(found: Sequence[dict[str, Any]]) -> str:
    """Return task types as a table."""
    rows = [("TYPE", "QUEUE", "TIMEOUT", "WHAT IT DOES")]
    rows += [(one["type"], one["queue"], f"{one['timeout_s']:g}s", one["summary"]) for one in found]
    return table(rows)


def workers(found: Sequence[dict[str, Any]]) -> str:
    """Return workers as a table."""
    rows = [("WORKER", "HOST", "PID", "RUNNING", "SLOTS", "QUEUES", "STARTED")]
    for one in found:
        busy = str(one["running"])
        rows.append((one["id"], one["host"], str(one["pid"]), busy, str(one["slots"]), ",".join(one["queues"]), _second(one["started_at"])))
    return table(rows)


def queues(found: Sequence[dict[str, Any]]) -> str:
    """Return queues as a table."""
    rows = [("QUEUE", "QUEUED", "DISPATCHED", "RUNNING", "STATE")]
    for one in found:
        counts = (str(one[name]) for name in (QUEUED, DISPATCHED, RUNNING))
        rows.append((one["name"], *counts, "paused" if one["paused"] else "open"))
    return table(rows)


def watch(seen: dict[str, Any]) -> str:
    """Return one look at the whole tower: its health, its queues, what is active and what has ended."""
    health = seen["health"]
    slots = f"{health['slots']} slots of {health['workers']} {'worker' if health['workers'] == 1 else 'workers'}"
    lines = [f"{health['status']}: {slots}", *(f"  {problem}" for problem in health["problems"])]
    parts = [plain_lines(lines), queues(seen["queues"])]
    parts += [tasks(seen["active"]) if seen["active"] else "Nothing waits or runs."]
    parts += [f"Just ended\n{tasks(seen['ended'])}"] if seen["ended"] else []
    return "\n\n".join(parts)


def plain_lines(lines: Iterable[str]) -> str:
    """Return lines that cannot act on a terminal."""
    return "\n".join(map(plain, lines))


def why(found: dict[str, Any]) -> str:
    """Return why a task waits, a line for each thing it waits for, and when it will start."""
    lines = [f"{found['status']}: {found['summary']}", ""]
    lines += [line for link in found["chain"] for line in (f"  {link['message']}", f"    frees: {link['frees']}")]
    told = found["estimate"]
    if told:
        at = found["estimated_start_at"]
        lines += ["", f"starts: {f'about {_second(at)}' if at else 'nobody can tell'} ({told['message']})"]
    return "\n".join(map(plain, lines))


def ending(found: dict[str, Any]) -> str:
    """Return how a task ended, in a sentence with what to do about it."""
    error = found["error"]
    told = f": {error['message']} {error['advice'] or ''}".rstrip() + f" ({error['code']})" if error else "."
    return plain(f"Task {found['id']} {found['status'].replace('_', ' ')}{told}")


def pairs(items: Iterable[tuple[str, Any]]) -> str:
    """Return names and values, the values below each other."""
    return table([(f"{name}:", value) for name, value in items])


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows with their columns below each other."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def _setting(value: Any) -> str:
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def _attempt(found: dict[str, Any]) -> str:
    if found["max_losses"] == 1:
        return f"{found['attempt']} (at most one, whatever happens)"
    lost = f", {found['losses']} lost with their workers" if found["losses"] else ""
    return f"{found['attempt']} (up to {found['max_attempts']} may fail{lost})"


def _state(found: dict[str, Any]) -> str:
    stopping = found["cancel_requested_at"] and found["status"] == RUNNING
    why = "stopping" if stopping else found["wait_reason"] or (found["error"] or {}).get("code")
    return f"{found['status']} ({why})" if why and why != found["status"] else str(found["status"])


def _second(at: str) -> str:
    return re.sub(r"\.\d+", "", at)


def _error_lines(found: dict[str, Any]) -> list[str]:
    error = found["error"]
    if not error:
        return []
    lines = ["", f"error: {plain(error['message'])}", *([f"  {error['advice']}"] if error["advice"] else [])]
    return lines + [line for name, value in error["details"].items() for line in _block(plain(name), value)]


def _values(found: dict[str, Any]) -> list[str]:
    return _block("payload", found["payload"]) + _block("result", found["result"])


def _block(name: str, value: Any) -> list[str]:
    """Return text as it is and other values as JSON, indented below their name; nothing for nothing."""
    if value is None or value == {}:
        return []
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return ["", f"{name}:", *(f"  {log_line(line)}" for line in text.split("\n"))]
