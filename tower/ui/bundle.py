"""A task's folder as one file: a tar that is made while it is sent."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tower import trace
from tower.errors import NotFound

_PIECE = 256 * 1024


def tar(root: Path, task_id: str) -> Iterator[bytes]:
    """Yield the folder as a tar; a file that grows meanwhile is as long as it was, and one that goes is left out."""
    for listed in trace.list_files(root, task_id):
        try:
            file = os.open(trace.find_file(root, task_id, listed["path"]), os.O_RDONLY | os.O_NOFOLLOW)
        except (NotFound, OSError):
            continue
        with open(file, "rb") as opened:
            info = tarfile.TarInfo(f"{task_id}/{listed['path']}")
            status = os.fstat(file)
            info.size, info.mtime, info.mode = status.st_size, int(status.st_mtime), 0o644
            yield info.tobuf(tarfile.PAX_FORMAT)
            left = info.size
            while left:
                piece = opened.read(min(_PIECE, left)) or bytes(min(_PIECE, left))  # cut off meanwhile: the length is promised
                left -= len(piece)
                yield piece
            yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
