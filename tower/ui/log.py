"""A log as a page shows it: some lines at a time out of any number, found without reading what is not shown."""

import os
import re
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

from tower import queries, trace
from tower.errors import InvalidTask, NotFound, Unavailable
from tower.ui.ansi import coloured, plain

#: Bytes between two places whose line numbers are remembered.
_BLOCK = 64 * 1024
#: Characters of a line that are shown; lines of a page; hits of a search.
_MOST_LINE, PAGE, _MOST_HITS = 4000, 150, 200
#: Seconds that one search takes at most, the lines it reads between two looks at the clock, and how many may search at once.
_SEARCH_S, _SEARCHED, _SEARCHES = 1.0, 2000, 2
#: Log chunks beyond the file that are read: a quarter of a megabyte each, at most.
_MOST_CHUNKS = 16
_FILES = 64
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) \[(\d+)\] (.*)", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """One line: its number from 1, and its text as it stands in the log."""

    number: int
    text: str

    def told(self) -> dict[str, Any]:
        """Return the line as a page shows it: its time, attempt, and text with colours."""
        text = self.text if len(self.text) <= _MOST_LINE else f"{self.text[:_MOST_LINE]} … ({len(self.text) - _MOST_LINE} more characters)"
        match = _LINE.fullmatch(text)
        at, attempt, said = match.groups() if match else ("", "", text)
        return {
            "number": self.number,
            "at": at,
            "clock": at[11:23],
            "attempt": attempt,
            "text": coloured(said),
            "is_event": said.startswith("── "),
        }


class _Index:
    """How many lines of a file end before each of its blocks; it grows with the file."""

    def __init__(self) -> None:
        self._before = [0]
        self._lock = Lock()

    @property
    def length(self) -> int:
        """The bytes that were read."""
        return (len(self._before) - 1) * _BLOCK

    def count(self, file: int, size: int) -> int:
        """Return how many whole lines the first `size` bytes have, reading what was not read before."""
        with self._lock:
            while size - self.length >= _BLOCK:
                self._before.append(self._before[-1] + os.pread(file, _BLOCK, self.length).count(b"\n"))
        block = size // _BLOCK  # the index may have grown further for somebody else
        return self._before[block] + os.pread(file, size - block * _BLOCK, block * _BLOCK).count(b"\n")

    def start_of(self, file: int, line: int) -> int:
        """Return the byte at which a line begins, counted from 0; it must be there."""
        if line == 0:
            return 0
        number = bisect_left(self._before, line) - 1  # the last block before whose end the line before has not ended
        block, at = os.pread(file, _BLOCK, number * _BLOCK), -1
        for _ in range(line - self._before[number]):
            at = block.index(b"\n", at + 1)
        return number * _BLOCK + at + 1


class _Indexes:
    """The indexes of the files that were looked at last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], _Index] = OrderedDict()
        self._lock = Lock()

    def of(self, task_id: str, file: int) -> _Index:
        """Return the index of the open log of a task; its number on the disk alone may be that of a file that is gone."""
        info = os.fstat(file)
        key = (task_id, info.st_dev, info.st_ino)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None or found.length > info.st_size:
                found = _Index()
            self._kept[key] = found
            while len(self._kept) > _FILES:
                self._kept.popitem(last=False)
            return found


_indexes = _Indexes()
_searching = BoundedSemaphore(_SEARCHES)


class Log:
    """The log of a task: the file as far as it was traced, and behind it what only the rows know yet.

    Make it inside `db.read`; what it reads afterwards is the file alone.
    """

    def __init__(self, root: Path, row: dict[str, Any]) -> None:
        self._task_id = row["id"]
        self._file = self._open(root)
        try:
            after = row["traced_seq"] if self._file is not None else 0
            self._more, self.is_cut = self._unwritten(after, row["seq"])
            self._size = min(row["traced_bytes"], os.fstat(self._file).st_size) if self._file is not None else 0
        except BaseException:
            self.close()
            raise
        self._index = _indexes.of(self._task_id, self._file) if self._file is not None else _Index()
        self._in_file: int | None = None

    @property
    def in_file(self) -> int:
        """How many lines the file has."""
        if self._in_file is None:
            self._in_file = self._index.count(self._file, self._size) if self._file is not None else 0
        return self._in_file

    @property
    def count(self) -> int:
        """How many lines there are."""
        return self.in_file + len(self._more)

    def _open(self, root: Path) -> int | None:
        try:
            return os.open(trace.find_file(root, self._task_id, trace.LOG), os.O_RDONLY | os.O_NOFOLLOW)
        except (NotFound, OSError):
            return None  # not traced yet, or on a disk that this server does not see

    def _unwritten(self, after: int, seq: int) -> tuple[list[str], bool]:
        """Return the lines that are not in the file, and whether there are more than is held at once."""
        if after >= seq:
            return [], False
        entries = queries.log_entries(self._task_id, after, _MOST_CHUNKS + 1)
        shown = [entry for entry in entries[:_MOST_CHUNKS] if entry["seq"] <= seq]
        return trace.render_log(shown).split("\n")[:-1], len(entries) > _MOST_CHUNKS

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)

    def lines(self, first: int, count: int) -> list[Line]:
        """Return some lines, from number `first` on."""
        first = max(1, first)
        in_file = max(0, min(count, self.in_file - first + 1))
        texts = list(self._of_file(first - 1, in_file)) if in_file else []
        behind = max(0, first - 1 - self.in_file)
        texts += self._more[behind : behind + count - in_file]
        return [Line(first + offset, text) for offset, text in enumerate(texts)]

    def _of_file(self, first: int, count: int) -> Iterator[str]:
        """Yield lines of the file from one on, counted from 0; they must be there."""
        assert self._file is not None  # noqa: S101  # asked only where there is one
        place, rest = self._index.start_of(self._file, first), b""
        while count > 0:
            *whole, rest = (rest + os.pread(self._file, min(_BLOCK, self._size - place), place)).split(b"\n")
            place += _BLOCK
            yield from (line.decode("utf-8", "replace") for line in whole[:count])
            count -= len(whole)

    def find(self, wanted: str, start: int) -> tuple[list[Line], int | None]:
        """Return the lines from number `start` on that hold a text, whatever its case, and where to go on if there may be more."""
        hits: list[Line] = []
        low, began = wanted.lower(), time.monotonic()
        while lines := self.lines(start, _SEARCHED):
            for line in lines:
                if low in (plain(line.text) if "\x1b" in line.text else line.text).lower():
                    if len(hits) == _MOST_HITS:
                        return hits, line.number
                    hits.append(line)
            start = lines[-1].number + 1
            if time.monotonic() - began > _SEARCH_S:
                return hits, start if start <= self.count else None
        return hits, None


def window(log: Log, first: int | None, count: int) -> dict[str, Any]:
    """Return some lines of a log from a number on, or the last ones."""
    first = max(1, log.count - count + 1) if first is None else min(max(1, first), max(1, log.count))
    lines = log.lines(first, min(count, PAGE))
    return {"lines": [line.told() for line in lines], "first": first, "count": log.count, "is_cut": log.is_cut}


def search(log: Log, wanted: str, start: int) -> dict[str, Any]:
    """Return the lines that hold a text, and where to go on; raise InvalidTask, or Unavailable while others search."""
    if not 1 <= len(wanted) <= 200:
        raise InvalidTask("Search for 1 to 200 characters.", code="invalid_field", field="find")
    if not _searching.acquire(timeout=_SEARCH_S):
        raise Unavailable("Others search logs right now.", code="busy", retry_after_s=2)
    try:
        hits, following = log.find(wanted, start)
    finally:
        _searching.release()
    return {"hits": [hit.told() for hit in hits], "following": following}
