"""What a task that has arrived is once it is entered among the others; see docs/decisions/0016 and 0017."""

from collections.abc import Mapping, Sequence

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
_EVENT = {"task_id": "id", "seq": "1", "attempt": "0", "at": "created_at", "kind": "'queued'", "data": "data"}
#: The first events of tasks that are entered.
EVENTS = f"SELECT {', '.join(_EVENT.values())} FROM brought WHERE id IN (SELECT id FROM entered)"


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


def arriving(table: str, columns: Sequence[str], once: str) -> str:
    """Return a SELECT of the rows that tasks would get in `task` or `task_event`, for who reads and may not write.

    `once` is a SELECT of what has arrived, each task once, which databases spell differently.
    """
    becomes = _ENTERED if table == "task" else _EVENT
    values = ", ".join(becomes.get(name, "NULL") for name in columns)
    return f"SELECT {values} FROM ({once}) AS brought WHERE NOT EXISTS (SELECT 1 FROM task WHERE task.id = brought.id)"


def together(steps: Mapping[str, str], last: str) -> str:
    """Return a statement of several steps by their names, and a last one."""
    return f"WITH {', '.join(f'{name} AS ({step})' for name, step in steps.items())} {last}"


#: Enters all tasks that have arrived.
ENTRY = together(entering("DELETE FROM task_arrived", "id"), f"INSERT INTO task_event ({', '.join(_EVENT)}) {EVENTS}")
