"""How facts read on a page: times, spans, statuses, JSON, and the templates that use them."""

import json
import re
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tower.trace import rfc3339
from tower.ui.ansi import ACTING, coloured

#: What each status is called, and the sign before it: nothing is told by colour alone.
STATUSES = {
    "queued": ("queued", "○"),
    "dispatched": ("handed out", "◔"),
    "running": ("running", "◐"),
    "succeeded": ("succeeded", "✓"),
    "failed": ("failed", "✕"),
    "cancelled": ("cancelled", "⊘"),
    "timed_out": ("timed out", "⏱"),
}
REASONS = {
    "not_before": "its time has not come",
    "retry_backoff": "pauses before its next attempt",
    "paused": "paused",
    "quarantine": "one more lost worker and it fails: such tasks run one at a time",
    "concurrency_key": "its key is taken",
    "rate_limit": "its rate is used up",
    "type_limit": "the limit of its type",
    "queue_limit": "the limit of its queue",
    "tower_limit": "the limit of the tower",
    "no_worker": "no worker for its queue",
    "no_free_slot": "no free slot",
}
_TICKED = re.compile("`([^`]+)`")
_SIZES = ("B", "KB", "MB", "GB", "TB")


def when(at: float | None) -> Markup:
    """Return a time as an element: exact and in UTC, which the script turns into words for the reader's place."""
    if at is None:
        return Markup("–")
    exact = rfc3339(at)
    moment = datetime.fromtimestamp(at, UTC)
    return Markup('<time datetime="{}" data-when title="{}">{}</time>').format(exact, exact, f"{moment:%Y-%m-%d %H:%M:%S} UTC")


def since(at: float | None) -> Markup:
    """Return how long ago a time was as an element that the script keeps counting; without it the time itself."""
    if at is None:
        return Markup("–")
    exact = rfc3339(at)
    return Markup('<time datetime="{}" data-since title="since {}">since {}</time>').format(
        exact, exact, f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"
    )


def span(seconds: float | None) -> str:
    """Return a number of seconds in the two units that matter, as in 3 min 20 s."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{max(0, seconds) * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, smaller, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            left = whole % size // smaller
            return f"{whole // size} {name}" + (f" {left} {rest}" if left else "")
    return f"{whole} s"


def size(count: int) -> str:
    """Return a number of bytes, as in 1.5 MB."""
    value = float(count)
    for name in _SIZES:
        if value < 1000 or name == _SIZES[-1]:
            return f"{value:.0f} {name}" if name == "B" else f"{value:.1f} {name}"
        value /= 1000
    raise AssertionError


def pretty(value: Any) -> str:
    """Return a value as indented JSON."""
    return readable(value, indent=2)


def coded(text: str) -> Markup:
    """Return a text in which what stands between backticks is code."""
    return Markup(_TICKED.sub(r"<code>\1</code>", str(escape(text))))  # noqa: S704  # escaped just now


def readable(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON that reads as it stands: characters that act are escaped."""
    return ACTING.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False, indent=indent))


def _shown(value: Any) -> Any:
    """Return what a page shows of a value: characters that act, or turn the direction of what follows, are seen instead."""
    return ACTING.sub("�", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tower.ui"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    made.filters |= {
        "when": when,
        "since": since,
        "span": span,
        "size": size,
        "pretty": pretty,
        "coloured": coloured,
        "coded": coded,
        "raw": escape,
    }
    made.globals |= {"STATUSES": STATUSES, "REASONS": REASONS}
    made.globals["parts"] = made.get_template("parts.html").module  # a part of a page is also made without the page around it
    return made


#: Every string that comes from a task is escaped by default.
templates = _environment()
