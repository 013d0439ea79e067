"""What a task that has arrived is once it is entered among the others; see docs/decisions/0016 and 0017."""

from collections.abc import Mapping

_BROUGHT = (
    *("id", "type", "queue", "payload", "priority", "concurrency_limit", "lane", "correlation_id", "max_attempts", "max_losses"),
    *("timeout_s", "rank", "nudge_at", "trace_due_at", "created_at"),
)
#: The columns of `task`, and what stands in them: what it brought along, and what every new task has.
_ENTERED = {
    **{name: name for name in _BROUGHT},
    **dict.fromkeys(("queued_at", "updated_at"), "created_at"),
    **dict.fromkeys(("attempt", "failures", "losses", "beat", "nudges", "traced_seq", "traced_bytes", "trace_tries", "ready_at"), "0"),
    "seq": "1",
    "status": "'queued'",
    "labels": "'{}'",
}
_AS_ENTERED = f"SELECT {', '.join(f'{value} AS {name}' for name, value in _ENTERED.items())} FROM brought"
#: The first events of tasks that are entered.
EVENTS = "SELECT entered.id, 1, 0, entered.created_at, 'queued', data FROM entered JOIN brought ON brought.id = entered.id"


def entering(gone: str, returning: str, sets: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return steps of a statement of Postgres by their names: `gone` deletes rows of what has arrived, and `entered` enters these tasks.

    `sets` is what becomes of them at that moment, as SQL by column. Their first events are still to be told; see `EVENTS`.
    """
    values = {**{name: name for name in _ENTERED}, **(sets or {})}
    enter = f"INSERT INTO task ({', '.join(values)}) SELECT {', '.join(values.values())} FROM ({_AS_ENTERED}) AS task"
    return {
        "gone": f"{gone} RETURNING *",
        # After a commit whose answer was lost a task arrives a second time, or is there already.
        "brought": "SELECT DISTINCT ON (id) * FROM gone",
        "entered": f"{enter} ON CONFLICT DO NOTHING RETURNING {returning}",
    }


def together(steps: Mapping[str, str], last: str) -> str:
    """Return a statement of several steps by their names, and a last one."""
    return f"WITH {', '.join(f'{name} AS ({step})' for name, step in steps.items())} {last}"


#: Enters all tasks that have arrived.
ENTRY = together(
    entering("DELETE FROM task_arrived", "id, created_at"), f"INSERT INTO task_event (task_id, seq, attempt, at, kind, data) {EVENTS}"
)
