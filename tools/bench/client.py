"""StreamClient: the load generator's connection. httptools parses the response; events are counted, not decoded.

A heavier client would measure itself: a general HTTP library and a JSON decode per chunk cost 50 to 100 µs per token,
more than the server does. Here an event is found by its bytes, and only the one with the usage is decoded.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from core.errors import QuireError

# Within a JSON text these cannot match: there every quote has a backslash before it.
_USAGE = re.compile(rb'"usage":\s*\{')
_NO_CHOICES = re.compile(rb'"choices":\s*\[\s*\]')
_ERROR = re.compile(rb'"error":\s*\{')
_NO_TEXT = re.compile(rb'"(?:text|content)":\s*(?:""|null)')
_DELTA_EMPTY = re.compile(rb'"delta":\s*\{\s*\}')
_FINISH = re.compile(rb'"finish_reason":\s*"')
_ROLE = re.compile(rb'"role":\s*"')


@dataclass
class Answer:
    """One request as its client saw it; times are time.monotonic() seconds.

    events: arrivals of the chunks with output (a chunk that only opens the answer, or only says that it ended, is
    none). output_tokens: of the server's usage; `counted` when it sent none, and chunks were counted instead.
    """

    index: int
    began_s: float
    events: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    status: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted: bool = False
    error: str = ""
    text: str = ""

    @property
    def ttft_s(self) -> float:
        """Seconds to the first chunk with output."""
        return self.events[0] - self.began_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds per output token after the first."""
        return (self.events[-1] - self.events[0]) / max(1, self.output_tokens - 1)


class StreamClient(asyncio.Protocol):
    """One keep-alive connection that carries one request at a time. Plain http only."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 600.0, keep_text: bool = False) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise QuireError("invalid_config", f"--url: must look like http://host:port, is {url!r}", "url")
        self._host, self._port = parts.hostname, parts.port or 80
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._key = key
        self._timeout_s = timeout_s
        self._keep_text = keep_text
        self._exchange: _Exchange | None = None
        self._transport: asyncio.Transport | None = None

    async def ask(self, index: int, path: str, body: bytes) -> Answer:
        """Send a streaming request and read its events to the end. Failures are told in Answer.error."""
        reused = self._transport is not None
        answer = await self._ask(index, path, body)
        if reused and answer.error == "connection lost" and not answer.status and not answer.events:
            # The server closed the idle connection while the request was on its way: that is no failure of either.
            answer = await self._ask(index, path, body)
        return answer

    async def _ask(self, index: int, path: str, body: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        if self._transport is None:
            try:
                self._transport, _ = await loop.create_connection(lambda: self, self._host, self._port)
            except OSError as error:
                now = time.monotonic()
                return Answer(index, now, ended_s=now, error=f"connect: {error.strerror or error}")
        authorization = f"Authorization: Bearer {self._key}\r\n" if self._key else ""
        head = (
            f"POST {self._base}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{authorization}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._exchange = exchange = _Exchange(Answer(index, time.monotonic()), self._keep_text)
        timer = loop.call_later(self._timeout_s, self._time_out)
        self._transport.write(head.encode() + body)
        await exchange.done
        timer.cancel()
        if not exchange.keep_alive:
            self.abandon()
        return exchange.answer

    def abandon(self) -> None:
        """Close the connection in the middle of whatever it does."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def _time_out(self) -> None:
        if self._exchange is not None:
            self._exchange.end(f"unfinished after {self._timeout_s:g} s")

    # -------------------------------------------------------------------------------------------------------- asyncio

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._exchange is not None:
            self._exchange.end("connection lost")


class _Exchange:
    """One request's response: bytes in, an Answer out. httptools calls its on_ methods."""

    def __init__(self, answer: Answer, keep_text: bool) -> None:
        self.answer = answer
        self.keep_alive = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser: Any = httptools.HttpResponseParser(self)
        self._rest = b""  # of the body: a cut event, or all of an error
        self._kept: list[bytes] | None = [] if keep_text else None

    def feed(self, data: bytes) -> None:
        if self.done.done():
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.end(f"http: {error}")

    def end(self, error: str = "") -> None:
        """The answer is complete, or will never be."""
        if self.done.done():
            return
        self.answer.error = self.answer.error or error
        self.answer.ended_s = time.monotonic()
        self.keep_alive = not error and bool(self._parser.should_keep_alive())
        if self.answer.events and not self.answer.output_tokens:
            self.answer.output_tokens, self.answer.counted = len(self.answer.events), True
        elif self.answer.output_tokens and not self.answer.events:
            self.answer.events.append(self.answer.ended_s)  # tokens without any text
        if self._kept is not None:
            self.answer.text = "".join(_text(event) for event in self._kept)
        self.done.set_result(None)

    def on_body(self, body: bytes) -> None:
        """Count the complete events of a piece of the body; a cut one waits for its rest."""
        now = time.monotonic()
        self.answer.status = self._parser.get_status_code()
        self._rest += body
        if self.answer.status != 200:
            return
        # A separator may be cut within itself: "\r" stays at the end and meets its "\n" the next time.
        if self._rest.startswith(b"{"):
            return  # an answer that is not streamed
        *events, self._rest = self._rest.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._event(event[5:].lstrip(), now)

    def _event(self, event: bytes, now: float) -> None:
        answer = self.answer
        if event == b"[DONE]":
            return
        if _USAGE.search(event):
            usage = json.loads(event)["usage"]
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.output_tokens = usage["completion_tokens"]
            answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if _ERROR.search(event):
            answer.error = _code(event)
            return
        if _NO_CHOICES.search(event) or _DELTA_EMPTY.search(event):
            return
        if (_FINISH.search(event) or _ROLE.search(event)) and _NO_TEXT.search(event):
            return
        answer.events.append(now)
        if self._kept is not None:
            self._kept.append(event)

    def on_message_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        if self.answer.status != 200:
            self.answer.error = _code(self._rest) or f"status {self.answer.status}"
        elif self._rest.startswith(b"{"):
            self._event(self._rest, time.monotonic())
        self.end()


def _text(event: bytes) -> str:
    """The output text of an event."""
    choice = json.loads(event)["choices"][0]
    return str((choice.get("delta") or {}).get("content") or choice.get("text") or "")


def _code(body: bytes) -> str:
    """The code of an error body; its beginning when it is none of OpenAI's shape."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error["type"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:80].decode("utf-8", "replace")
