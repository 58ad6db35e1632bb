"""StreamClient: the load generator's connection. httptools parses the response; events are counted, not decoded.

A heavier client would measure itself: at 20,000 tokens/s a JSON decode per chunk costs more than the server does.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


@dataclass
class Answer:
    """One request as its client saw it; times are time.monotonic() seconds. `events`: arrivals of output chunks."""

    index: int
    began_s: float
    events: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    status: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first chunk."""
        return self.events[0] - self.began_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per output token after the first."""
        return (self.events[-1] - self.events[0]) / max(1, self.output_tokens - 1)


class StreamClient(asyncio.Protocol):
    """One keep-alive connection that carries one request at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.base = parts.path.rstrip("/")
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._answer = Answer(-1, 0.0)
        self._parser: Any = None
        self._body = bytearray()

    async def ask(self, index: int, path: str, body: bytes, key: str | None = None) -> Answer:
        """Send a streaming request and read its events to the end. Failures are told in Answer.error."""
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport.is_closing():
            try:
                self._transport, _ = await loop.create_connection(lambda: self, self.host, self.port)
            except OSError as error:
                return Answer(index, time.monotonic(), ended_s=time.monotonic(), error=f"connect: {error.strerror}")
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        self._done = loop.create_future()
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        head = (
            f"POST {self.base}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{authorization}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._answer = Answer(index, time.monotonic())
        self._transport.write(head.encode() + body)
        await self._done
        self._answer.ended_s = time.monotonic()
        return self._answer

    def abandon(self) -> None:
        """Close the connection in the middle of whatever it does."""
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------------------------ asyncio and httptools

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"http: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail("connection lost")

    def on_body(self, body: bytes) -> None:
        """Count the complete events of a piece of the body; a cut one waits for its rest."""
        now = time.monotonic()
        self._body += body
        if self._parser.get_status_code() != 200:
            return
        end = self._body.rfind(b"\n\n")
        if end < 0:
            return
        whole = bytes(self._body[: end + 2])
        del self._body[: end + 2]
        for event in whole.split(b"\n\n"):
            self._event(event, now)

    def _event(self, event: bytes, now: float) -> None:
        if not event.startswith(b"data: ") or event == b"data: [DONE]":
            return
        if b'"usage":{' in event:
            usage = json.loads(event[6:])["usage"]
            self._answer.prompt_tokens = usage["prompt_tokens"]
            self._answer.output_tokens = usage["completion_tokens"]
            self._answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if b'"choices":[]' in event:
            return
        if b'"error":{' in event:
            self._answer.error = _code(event[6:])
        elif b'"delta":{"role":"assistant","content":""}' not in event:
            self._answer.events.append(now)

    def on_message_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()
        if self._answer.status != 200:
            self._answer.error = _code(bytes(self._body)) or f"status {self._answer.status}"
        if not self._parser.should_keep_alive() and self._transport is not None:
            self._transport.close()
            self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, text: str) -> None:
        if self._done is not None and not self._done.done():
            self._answer.error = self._answer.error or text
            self._done.set_result(None)


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return body[:80].decode("utf-8", "replace")
