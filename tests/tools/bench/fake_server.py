"""A small OpenAI-compatible server for the load generator's tests: it streams, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Answerer = Callable[[dict[str, Any]], bytes | None]


@dataclass
class FakeServer:
    """Answers every request with max_tokens chunks of one token, then usage.

    chat_overhead: tokens that the template adds. pause_s: before each chunk. cut: bytes per write (0: an event each).
    newline: what ends a line. fail: a whole HTTP answer instead, for the bodies that it wants to refuse.
    """

    url: str = ""
    chat_overhead: int = 7
    pause_s: float = 0.0
    cut: int = 0
    newline: str = "\n"
    send_usage: bool = True
    close_after_answer: bool = False
    fail: Answerer = lambda body: None
    count_tokens: Callable[[str], int] = lambda text: len(text.split())
    bodies: list[dict[str, Any]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    connections: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    int(line.split(":")[1]) for line in head.lower().split("\r\n") if "content-length" in line
                )
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                await self._answer(head.split()[1], body, writer)
                if self.close_after_answer:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        try:
            if (refusal := self.fail(body)) is not None:
                writer.write(refusal)
                await writer.drain()
                return
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for event in self._events(path, body):
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                data = f"data: {event}{self.newline}{self.newline}".encode()
                for at in range(0, len(data), self.cut or len(data)):
                    piece = data[at : at + (self.cut or len(data))]
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                    if self.cut:
                        await writer.drain()
                        await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        chat = path == "/v1/chat/completions"
        if chat:
            yield '{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
        for number in range(body["max_tokens"]):
            text = f'w{number} "usage":{{ }} "choices":[]\n\n'  # nasty: must not be taken for the event's own keys
            piece: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            yield json.dumps({"choices": [{"index": 0, **piece, "finish_reason": None}], "usage": None})
        end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield json.dumps({"choices": [{"index": 0, **end, "finish_reason": "length"}]})
        if self.send_usage:
            usage = {"prompt_tokens": self._prompt_tokens(body), "completion_tokens": body["max_tokens"]}
            yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"

    def _prompt_tokens(self, body: dict[str, Any]) -> int:
        if "messages" in body:
            return self.chat_overhead + sum(self.count_tokens(message["content"]) for message in body["messages"])
        prompt = body["prompt"]
        return self.count_tokens(prompt) if isinstance(prompt, str) else len(prompt)


@contextmanager
def serving(**options: Any) -> Iterator[FakeServer]:
    """A FakeServer on a free port, in a thread of its own."""
    fake = FakeServer(**options)
    started = threading.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    started.wait()
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def refusal(status: int, code: str) -> bytes:
    """An HTTP answer with an OpenAI-shaped error."""
    body = json.dumps({"error": {"message": "no", "type": "t", "param": None, "code": code}}).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body
