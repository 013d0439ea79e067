"""Says whether this machine's worker lives: `python -m actors.alive`, the health check of a worker's container."""

import sys

from tower import db, queries
from tower.errors import TowerError
from tower.host import hostname
from tower.settings import Settings, load

#: A worker renews its row every 5 s; one that missed this many seconds is stuck.
_WITHIN_S = 20.0


def problem(settings: Settings) -> str | None:
    """Return what is wrong with the worker on this machine, None if it renewed its row just now."""
    db.open_database(settings)
    try:
        workers = db.read(lambda: queries.live_workers(_WITHIN_S), patience_s=1, sees_arrived=False)
    finally:
        db.close_database()
    if any(worker["host"] == hostname() for worker in workers):
        return None
    return f"No worker on {hostname()} renewed its row within {_WITHIN_S:g} s."


def main() -> int:
    """Print what is wrong, if anything is; return the exit code."""
    try:
        found = problem(load())
    except TowerError as error:
        found = error.message
    sys.stderr.write(f"{found}\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
