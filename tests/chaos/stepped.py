"""The server with a database clock that a test may step: `python -m tests.chaos.stepped FILE`, which holds seconds to add. For SQLite.

SQLite takes `julianday('now')` from the process that asks, so that is where it can be moved. In Postgres the stage puts functions of
its own before `clock_timestamp` and `statement_timestamp`; see stage.py.
"""

import sys
import time
from pathlib import Path

import peewee

from tower import db
from tower.main import main
from tower.settings import Settings

UNIX_EPOCH = 2440587.5


def step_with(file: Path) -> None:
    """Let every SQLite database that is opened from now on read its clock with the seconds in this file added."""
    opened = db._sqlite

    def stepped(settings: Settings) -> peewee.Database:
        database = opened(settings)
        database.register_function(lambda _: (time.time() + float(file.read_text())) / 86_400 + UNIX_EPOCH, "julianday", 1)
        return database

    db._sqlite = stepped


if __name__ == "__main__":
    step_with(Path(sys.argv.pop(1)))
    sys.exit(main())
