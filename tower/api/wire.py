"""HTTP as uvicorn speaks it, with an end to what a client may keep open: a request arrives whole in time, and its head is small."""

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Wire(HttpToolsProtocol):
    """One connection; who sends a byte now and then, or a head without end, is cut off."""

    #: Seconds from the first byte of a request to its last, and from the opening of a connection to its first request.
    receive_s = 60.0
    #: Bytes of the request line and headers together.
    max_head = 65_536

    _clock: asyncio.TimerHandle | None = None
    _in_head = False
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock: a connection that asks for nothing is closed."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head; uvicorn would collect them without end."""
        if self._clock is None:
            self._start_clock()
        super().data_received(data)
        self._head = self._head + len(data) if self._in_head else 0
        if self._head > self.max_head:
            self._cut_off(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """Start the clock of a request that comes right behind another."""
        super().on_message_begin()
        self._in_head = True
        if self._clock is None:
            self._start_clock()

    def on_headers_complete(self) -> None:
        """Note that the body follows."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Stop the clock: how long the answer takes is another matter."""
        super().on_message_complete()
        self._stop_clock()

    def _start_clock(self) -> None:
        self._clock = self.loop.call_later(self.receive_s, self._time_is_up)

    def _stop_clock(self) -> None:
        if self._clock:
            self._clock.cancel()
            self._clock = None

    def _time_is_up(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        if is_answering or self.pipeline:  # what comes behind a request waits for its answer
            self._start_clock()
        else:
            self._cut_off(HTTPStatus.REQUEST_TIMEOUT)

    def _cut_off(self, status: HTTPStatus) -> None:
        """Close the connection, and say why unless the request was answered already."""
        if self.transport.is_closing():
            return
        if self._in_head or (self.cycle is not None and not self.cycle.response_started):
            self.transport.write(f"HTTP/1.1 {status} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode("ascii"))
        self.transport.close()
