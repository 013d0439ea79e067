"""Backup and restore: one portable file that holds every row as it was at one moment, for SQLite and Postgres alike.

The file is a gzipped tar: `<table>.jsonl` for each table, a JSON list per row, and last `manifest.json` with the schema, the columns,
the counts and the SHA-256 of each. Folders are not in it: they follow from the rows, byte for byte, and are written again after a restore.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

from peewee import BlobField, Model

from tower import __version__, db, queries
from tower.errors import TowerError
from tower.models import TABLES, Decision, Rule, Task, Worker
from tower.settings import Settings

_FORMAT = 1
_MANIFEST = "manifest.json"
#: A worker belongs to the life in which it was started.
_KEPT = tuple(table for table in TABLES if table not in (Decision, Worker))
#: Rows of one INSERT, and their characters: chunks of logs are large.
_ROWS, _CHARACTERS = 400, 4_000_000
_PIECE = 1 << 16

Progress = Callable[[str, int], None]


class BackupError(TowerError):
    """The backup cannot be made, or not be restored."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="backup")


def backup(place: Path, progress: Progress = lambda table, count: None) -> dict[str, Any]:
    """Write every row of the open database to a new file, beside and then renamed; return the manifest. The tower may run meanwhile."""
    if place.exists():
        raise BackupError(f"There is a file {place} already; name another.")
    beside: Path | None = None
    try:
        number, name = tempfile.mkstemp(prefix=f".{place.name}.", suffix=".new", dir=place.parent)
        beside = Path(name)
        with open(number, "wb") as file:
            manifest = _write(file, progress, place.parent)
            file.flush()
            os.fsync(file.fileno())
        os.link(beside, place)  # unlike a rename it never replaces what came meanwhile
    except FileExistsError:
        raise BackupError(f"There is a file {place} already; name another.") from None
    except OSError as error:
        raise BackupError(f"The backup cannot be written to {place}: {error.strerror or error}.") from error
    finally:
        if beside:
            with suppress(OSError):
                beside.unlink()
    return manifest


def _write(file: IO[bytes], progress: Progress, folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"format": _FORMAT, "tower": __version__, "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    told |= {"schema": db.schema(), "tables": {}}
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        with db.snapshot() as rows:
            for table in _KEPT:
                told["tables"][_name(table)] = _write_table(tar, table, rows, progress, folder)
        text = json.dumps(told, indent=2).encode()
        tar.addfile(_member(_MANIFEST, len(text)), io.BytesIO(text))
    return told


def _write_table(tar: tarfile.TarFile, table: type[Model], rows: db.Rows, progress: Progress, folder: Path) -> dict[str, Any]:
    columns, digest, count = _columns(table), hashlib.sha256(), 0
    with tempfile.TemporaryFile(dir=folder) as held:  # a member of a tar begins with its size
        for row in rows(_name(table), columns):
            line = json.dumps([_plain(value) for value in row], ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            held.write(line)
            digest.update(line)
            count += 1
            progress(_name(table), count)
        size = held.tell()
        held.seek(0)
        tar.addfile(_member(f"{_name(table)}.jsonl", size), held)
    return {"columns": columns, "rows": count, "sha256": digest.hexdigest()}


def _member(name: str, size: int) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.mode = size, 0o600
    return made


def _name(table: type[Model]) -> str:
    return str(table._meta.table_name)


def _columns(table: type[Model]) -> list[str]:
    return [str(column.column_name) for column in table._meta.sorted_fields]


def _plain(value: object) -> object:
    return base64.b64encode(bytes(value)).decode() if isinstance(value, bytes | bytearray | memoryview) else value


def restore(place: Path, settings: Settings, progress: Progress = lambda table, count: None) -> dict[str, Any]:
    """Load a backup into the open database, which must be empty; return the manifest. All of it or nothing.

    The whole file is checked before anything is touched.
    """
    manifest = _verified(place)
    if db.has_tables():
        db.read(partial(_refuse_used, settings))
    db.migrate()

    def load() -> None:
        _refuse_used(settings)  # nobody may have come in between
        _load(place, manifest, progress)

    db.unit(load, patience_s=0)
    return manifest


def _verified(place: Path) -> dict[str, Any]:
    """Return the manifest of a whole and unchanged file; raise BackupError for any other."""
    found: dict[str, tuple[int, str]] = {}
    manifest: Any = None
    try:
        for name, file in _members(place):
            if name in found or manifest is not None:
                raise ValueError(f"{name} stands in it twice, or behind the manifest")
            if name == _MANIFEST:
                manifest = json.loads(file.read())
                continue
            digest, count = hashlib.sha256(), 0
            for line in file:
                digest.update(line)
                count += 1
            found[name] = (count, digest.hexdigest())
    except FileNotFoundError:
        raise BackupError(f"There is no file {place}.") from None
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError) as error:
        raise BackupError(f"{place} is no backup of a tower, or it is damaged: {error}") from error
    try:
        if manifest["format"] != _FORMAT or not {_name(table) for table in _KEPT}.issuperset(manifest["tables"]):
            raise ValueError
        told = {f"{name}.jsonl": (table["rows"], table["sha256"]) for name, table in manifest["tables"].items()}
        _refuse_newer(manifest["schema"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BackupError(f"{place} is no whole backup that this tower can read.") from None
    if told != found:
        wrong = sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))
        raise BackupError(f"{place} is damaged: {', '.join(wrong)} is not what its manifest says.")
    return dict(manifest)


def _members(place: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with gzip.open(place) as packed:
        with tarfile.open(fileobj=packed, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"{member.name} is no file")
                yield member.name, file
        while packed.read(_PIECE):  # the check-sum of the whole comes last
            pass


def _refuse_newer(schema: list[str]) -> None:
    newer = sorted(set(schema) - set(db.schema()))
    if newer:
        raise BackupError(f"The backup was made by a newer tower ({', '.join(newer)}); upgrade this one.")


def _refuse_used(settings: Settings) -> None:
    """Raise BackupError if the database holds something already, or a tower runs on it."""
    if Task.select(Task.id).exists() or Rule.select(Rule.name).exists():
        raise BackupError("The database is not empty, and nothing in it is ever replaced; set DATABASE_URL to a new one.")
    if queries.live_workers(settings.lease_s):
        raise BackupError("A tower runs on this database; stop it first.")


def _load(place: Path, manifest: dict[str, Any], progress: Progress) -> None:
    tables = {f"{_name(table)}.jsonl": table for table in _KEPT}
    for name, file in _members(place):
        if name == _MANIFEST:
            break
        table, columns = tables[name], manifest["tables"][name.removesuffix(".jsonl")]["columns"]
        binary = {place for place, column in enumerate(columns) if isinstance(table._meta.columns.get(column), BlobField)}
        for count, rows in _batches(file, columns, binary):
            table.insert_many(rows).execute()
            progress(_name(table), count)
    if db.is_postgres():
        db.database.execute_sql("SET LOCAL statement_timeout = 0")
    Task.update(lane=Task.id).where(Task.lane == "").execute()  # of a tower that had no lanes yet: as its migration does
    # The folders of this life are written by it, and its orchestrator has to hear of every task.
    Task.update(traced_seq=0, traced_bytes=0, trace_tries=0, trace_due_at=0, trace_error=None, nudge_at=0).execute()


def _batches(file: IO[bytes], columns: list[str], binary: set[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield rows as dicts, some at a time, with the number there were so far."""
    batch: list[dict[str, Any]] = []
    size = count = 0
    for line in file:
        values = [base64.b64decode(value) if place in binary else value for place, value in enumerate(json.loads(line))]
        batch.append(dict(zip(columns, values, strict=True)))
        size, count = size + len(line), count + 1
        if len(batch) == _ROWS or size > _CHARACTERS:
            yield count, batch
            batch, size = [], 0
    if batch:
        yield count, batch
