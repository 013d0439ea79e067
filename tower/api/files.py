"""How a file of a trace is answered: whole or by one byte range, and never so that a browser runs what a task wrote."""

import os
import re
from collections.abc import Iterator
from io import BytesIO
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
    file = open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")  # noqa: SIM115  # closed when it is sent
    info = os.fstat(file.fileno())
    return _send(request, file, info.st_size, path.name, f'"{info.st_mtime_ns:x}-{info.st_size:x}"')


def send_bytes(request: Request, data: bytes, name: str) -> Response:
    """Answer with what a file of that name would hold."""
    return _send(request, BytesIO(data), len(data), name, None)


def _send(request: Request, file: BinaryIO, size: int, name: str, etag: str | None) -> Response:
    shown = _SHOWN.get(Path(name).suffix.lower())
    headers = {
        "accept-ranges": "bytes",
        "content-disposition": f"{'inline' if shown else 'attachment'}; filename*=utf-8''{quote(name, safe='')}",
        "content-security-policy": _SANDBOX,
    }
    if etag:
        headers["etag"] = etag
    start, end, status = 0, size, 200
    asked = _RANGE.fullmatch(request.headers.get("range", ""))  # several ranges, or another unit: the whole file, as RFC 9110 allows
    if asked and request.headers.get("if-range", etag) == etag:
        start, end = _bounds(asked, size)
        if start >= end:
            file.close()
            return problem(416, "range_not_satisfiable", f"The file has {size} bytes.", headers={"content-range": f"bytes */{size}"})
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        status = 206
    headers["content-length"] = str(end - start)
    return StreamingResponse(_pieces(file, start, end), status, headers, shown or "application/octet-stream")


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
