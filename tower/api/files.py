"""How a file of a trace is answered: whole or by one byte range, and never so that a browser runs what a task wrote."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from tower.api.errors import problem

_PIECE = 256 * 1024
_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))", re.ASCII)

#: Only these are shown by a browser; everything else is downloaded.
_SHOWN = {
    ".txt": "text/plain; charset=utf-8",
    ".log": "text/plain; charset=utf-8",
    ".md": "text/plain; charset=utf-8",
    ".csv": "text/plain; charset=utf-8",
    ".json": "application/json",
    ".jsonl": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".gif": "image/gif",
}
#: What a file may come as, for the OpenAPI document.
MEDIA_TYPES = ("application/octet-stream", *sorted({kind.partition(";")[0] for kind in _SHOWN.values()}))
_SANDBOX = "sandbox; default-src 'none'; img-src 'self'; style-src 'unsafe-inline'"


def send_file(request: Request, path: Path) -> Response:
    """Answer with a file as it is now: what is appended while it is sent is not part of the answer."""
    file = _opened(path)
    info = os.fstat(file.fileno())
    size, etag = info.st_size, f'"{info.st_mtime_ns:x}-{info.st_size:x}"'
    kind, headers = _kind(path.name)
    headers |= {"accept-ranges": "bytes", "etag": etag}
    start, end, status = 0, size, 200
    asked = _asked(request.headers.get("range", ""))
    if asked and request.headers.get("if-range", etag) == etag:
        start, end = _bounds(asked, size)
        if start >= end:
            file.close()
            return problem(416, "range_not_satisfiable", f"The file has {size} bytes.", headers={"content-range": f"bytes */{size}"})
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        status = 206
    headers["content-length"] = str(end - start)
    return StreamingResponse(_pieces(file, start, end), status, headers, kind)


def beginning(path: Path, size: int) -> Iterator[bytes] | None:
    """Return the first `size` bytes of a file, piece by piece; None if it is shorter."""
    file = _opened(path)
    if os.fstat(file.fileno()).st_size < size:
        file.close()
        return None
    return _pieces(file, 0, size)


def _opened(path: Path) -> BinaryIO:
    """Return a file, to be closed when it is sent."""
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def send_pieces(pieces: Iterable[bytes], name: str) -> Response:
    """Answer with what a file of that name would hold, as it is made: whole, because its size is known only at its end."""
    kind, headers = _kind(name)
    return StreamingResponse(pieces, 200, headers, kind)


def _kind(name: str) -> tuple[str, dict[str, str]]:
    """Return the media type of a file of that name, and the headers that keep it from being run."""
    shown = _SHOWN.get(Path(name).suffix.lower())
    headers = {
        "content-disposition": f"{'inline' if shown else 'attachment'}; filename*=utf-8''{quote(name, safe='')}",
        "content-security-policy": _SANDBOX,
    }
    return shown or "application/octet-stream", headers


def _asked(text: str) -> re.Match[str] | None:
    """Return the range that a header asks for; None for several, another unit, or a last byte before the first: RFC 9110 ignores those."""
    asked = _RANGE.fullmatch(text)
    return None if asked and asked[2] and int(asked[2]) < int(asked[1]) else asked


def _bounds(asked: re.Match[str], size: int) -> tuple[int, int]:
    """Return where the bytes that a Range asks for start and end; start is not before end if there are none."""
    first, last, suffix = asked.groups()
    if suffix is not None:
        return max(0, size - int(suffix)), size
    return int(first), min(int(last) + 1, size) if last else size


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < end:
            piece = file.read(min(_PIECE, end - start))
            if not piece:
                return  # cut meanwhile: the client sees that bytes are missing
            start += len(piece)
            yield piece
