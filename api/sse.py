"""Server-sent events: a stream of chunks, written with as little work per token as possible.

The news of one engine step become one write. Nothing of a chunk is built anew but its text, which is JSON-escaped into
a template (see the writers in api/routes).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from starlette.types import Receive, Scope, Send

from api.engine_client import ClientGone, Event, Stream
from api.schema.errors import error_body
from api.service import Service
from core.errors import QuireError
from core.messages import Delta, Finished

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]
_MAX_STALLED_TICKS = 4  # keep-alive periods after which a client that reads nothing is given up


class Writer(Protocol):
    """Turns events into the bytes of chunks."""

    def write(self, news: list[tuple[int, Event]]) -> bytes:
        """The chunks for a step's news; may be empty."""
        ...

    def end(self) -> bytes:
        """What follows the last news, before [DONE]."""
        ...


async def watch(receive: Receive, stream: Stream) -> None:
    """Wait until the client goes away, then abort. Runs beside the answer, as a task."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close()


class EventStream:
    """The ASGI answer of a streaming request.

    The response begins with the first output, so that a request which is rejected still gets its HTTP status; with
    nothing to say for `keep_alive_s` it begins anyway, and comments keep the connection open. An error after that is
    an event of its own, and the stream ends without [DONE].
    """

    status_code = 200

    def __init__(self, stream: Stream, writer: Writer, service: Service) -> None:
        self._stream = stream
        self._writer = writer
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stream:
            watcher = asyncio.create_task(watch(receive, self._stream))
            try:
                await self._run(send)
            except ClientGone:
                pass
            finally:
                watcher.cancel()

    async def _run(self, send: Send) -> None:
        ticks = _Ticks(self._service.keep_alive_s, self._stream.poke)
        try:
            held: list[tuple[int, Event]] = []
            async for news in self._stream:
                held += news
                if not news or any(isinstance(event, Delta | Finished) for _, event in held):
                    break
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                await self._send(send, self._writer.write(held) or KEEP_ALIVE, ticks)
                async for news in self._stream:
                    chunk = self._writer.write(news) if news else KEEP_ALIVE
                    if chunk:
                        await self._send(send, chunk, ticks)
                last = self._writer.end() + DONE
            except QuireError as error:
                self._service.count_error(error.code)
                last = b"data: " + error_body(error) + b"\n\n"
            await self._send(send, last, ticks, more=False)
        finally:
            ticks.stop()

    async def _send(self, send: Send, chunk: bytes, ticks: _Ticks, *, more: bool = True) -> None:
        ticks.busy = True
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        ticks.busy = False
        ticks.silent = False


class _Ticks:
    """A timer that pokes a silent stream, and ends the task of a client that does not read at all."""

    def __init__(self, period_s: float, poke: Callable[[], None]) -> None:
        self.silent = True
        self.busy = False
        self._stalled = 0
        self._period_s = period_s
        self._poke = poke
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(period_s, self._tick)

    def _tick(self) -> None:
        self._stalled = self._stalled + 1 if self.busy and self.silent else 0
        if self._stalled >= _MAX_STALLED_TICKS and self._task is not None:
            self._task.cancel("the client does not read")
            return
        if self.silent and not self.busy:
            self._poke()
        self.silent = True
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._tick)

    def stop(self) -> None:
        self._timer.cancel()
