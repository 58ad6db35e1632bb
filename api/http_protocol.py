"""HttpProtocol: uvicorn's, with bounds on a request's head, which nobody has been asked a key for yet."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api.schema.errors import error_body
from core.errors import QuireError, http_status

MAX_HEAD_BYTES = 64 * 1024  # and what one more read brings; common proxies allow 8 to 64 KiB
HEAD_S = 60.0  # from the connection, or from a head's first byte, to its last


class HttpProtocol(HttpToolsProtocol):
    """One connection. A head that is too large is answered with 431; one that does not end closes the connection."""

    _head_bytes: int | None = 0  # what has come of a head that has not ended; None while a body comes
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)  # where the head ends, the count does
        if self._head_bytes is not None and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def on_headers_complete(self) -> None:
        self._head_ended()
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def _head_ended(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:  # else: pipelined behind an answer that still runs
            self.transport.close()

    def _refuse(self) -> None:
        error = QuireError("head_too_large", f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes")
        body = error_body(error)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[http_status(error.code)] + head + body)
        self.transport.close()
