"""A fake tokenizer process over a real socket, and the real app over a real port, for the tests of api/."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop
import zmq

from api.app import make_app
from api.engine_client import EngineClient
from api.http_server import HttpServer
from api.keys import Keys
from api.served import ServedModel
from api.service import Service
from api.zmq_server import ZmqServer
from core.channel import Client, PeerGone, Server
from core.messages import (
    Abort,
    Delta,
    Failed,
    Finished,
    FromTokenizer,
    Generate,
    Rejected,
    Started,
    StatsReply,
    TextPrompt,
    TokensPrompt,
    TokenText,
    ToTokenizer,
)
from core.sampling import SamplingLimits
from quire import SamplingParams

WORDS = ["Hel", "lo", " wör", "ld", '"\n']  # ids 10, 11, …; ends with "stop" after the last
TEXT = "".join(WORDS)
MODEL = ServedModel(
    name="tiny-chat",
    engine="tiny-chat@r1",
    created=1_700_000_000,
    limits=SamplingLimits(vocab_size=4096, max_model_len=2048),
    defaults=SamplingParams(temperature=0.0),
)


def word(index: int, alternatives: int | None = None) -> TokenText:
    """Token `index` of the script as a client sees it."""
    text = WORDS[index]
    top = [(10 + index, text, text.encode(), -0.25), (7, "?", b"?", float("-inf"))]
    return TokenText(10 + index, text, text.encode(), -0.25, 0, top[: alternatives or 0])


class FakeTokenizer:
    """Answers every request with WORDS, one token per step; the prompt's text may ask for something else.

    "reject": Rejected. "fail": Failed after two tokens. "hang": silence. "flood": tokens without end.
    """

    def __init__(self, address: str, step_s: float = 0.0) -> None:
        self.requests: list[Generate] = []
        self.aborted: list[str] = []
        self.stopping = False
        self._server: Server[ToTokenizer] = Server(zmq.Context.instance(), address, ToTokenizer)
        self._step_s = step_s
        self._live: dict[str, tuple[str, Generate, int]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.stopping = True
        self._thread.join(5)
        self._server.close()

    def wait_for_abort(self, count: int = 1, within_s: float = 3.0) -> float:
        """Seconds until `count` aborts have come."""
        began = time.monotonic()
        while len(self.aborted) < count:
            assert time.monotonic() - began < within_s, "no abort came"
            time.sleep(0.002)
        return time.monotonic() - began

    def _run(self) -> None:
        while not self.stopping:
            frame = self._server.receive(0.0 if self._live else 0.02)
            if frame is not None:
                for message in frame[1]:
                    self._take(frame[0], message)
                continue
            news: dict[str, list[Any]] = {}
            for peer, request, done in list(self._live.values()):
                news.setdefault(peer, []).extend(self._step(peer, request, done))
            for peer, messages in news.items():
                with contextlib.suppress(PeerGone):
                    self._server.send(peer, messages)
            time.sleep(self._step_s)

    def _take(self, peer: str, message: Generate | Abort) -> None:
        if isinstance(message, Abort):
            self.aborted.append(message.request_id)
            self._live.pop(message.request_id, None)
            return
        self.requests.append(message)
        text = message.prompt.text if isinstance(message.prompt, TextPrompt) else ""
        if text == "reject":
            reason = "the prompt has 9999 tokens; at most 2048 fit"
            refused = Rejected(message.request_id, "context_length_exceeded", reason, "prompt")
            self._server.send(peer, [refused])
            return
        if text == "busy":
            self._server.send(peer, [Rejected(message.request_id, "queue_full", "too many", None, 2.5)])
            return
        ids = message.prompt.ids if isinstance(message.prompt, TokensPrompt) else [1, 2, 3]
        pieces = (ids, text or "<1><2><3>") if message.want_prompt else ([], "")
        self._server.send(peer, [Started(message.request_id, len(ids), *pieces)])
        if text != "hang":
            self._live[message.request_id] = (peer, message, 0)

    def _step(self, peer: str, request: Generate, done: int) -> list[Any]:
        sampling = request.sampling
        text = request.prompt.text if isinstance(request.prompt, TextPrompt) else ""
        if text == "fail" and done == 2:
            del self._live[request.request_id]
            return [Failed(request.request_id, "worker_failed", "rank 0 died")]
        self._live[request.request_id] = (peer, request, done + 1)
        endless = text == "flood"
        last = not endless and done + 1 == min(len(WORDS), sampling.max_tokens or 10_000)
        place = done % len(WORDS)
        reason = None if not last else "stop" if done + 1 == len(WORDS) else "length"
        news: list[Any] = [
            Delta(
                request.request_id,
                choice,
                done,
                WORDS[place],
                [10 + place],
                [word(place, sampling.logprobs)] if sampling.logprobs is not None else [],
                reason,
                None,
                [None, word(0, sampling.prompt_logprobs), word(1, sampling.prompt_logprobs)]
                if done == 0 and choice == 0 and sampling.prompt_logprobs is not None
                else [],
            )
            for choice in range(sampling.n)
        ]
        if last:
            del self._live[request.request_id]
            news.append(Finished(request.request_id, 3, (done + 1) * sampling.n, 2))
        return news


class FakeFigures:
    """What the supervisor would answer."""

    def __init__(self) -> None:
        self.state = "ready"
        self.progressing = True
        self.reply = StatsReply(1, "ready", {}, {})

    async def query(self) -> StatsReply:
        return self.reply


class Doors:
    """The real doors on a thread of their own: `url`, `address` (ZeroMQ), `engine`, `figures`."""

    def __init__(
        self,
        folder: Path,
        *,
        tokenizers: int = 1,
        strict: bool = False,
        keys: Keys | None = None,
        cors_origins: Sequence[str] = (),
        tls: ssl.SSLContext | None = None,
        **engine_options: Any,
    ) -> None:
        self.address = f"ipc://{folder}/door"
        self.figures = FakeFigures()
        self._folder = folder
        self._tokenizers = tokenizers
        self._strict = strict
        self._keys = Keys() if keys is None else keys
        self._cors_origins = cors_origins
        self._tls = tls
        self._options = {"max_live": 1000, **engine_options}
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listening.getsockname()[1]}"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._main()), daemon=True)
        self._thread.start()
        assert self._ready.wait(5)

    async def _main(self) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        links: list[Client[FromTokenizer]] = [
            Client(context, f"ipc://{self._folder}/tokenizer-{index}", FromTokenizer, name="api-0")
            for index in range(self._tokenizers)
        ]
        self.engine = EngineClient(links, MODEL.engine, "t.", **self._options)
        self.engine.start()
        service = Service(self.engine, MODEL, self.figures, "1.2.3", 100_000, self._strict, keep_alive_s=0.2)
        app = make_app(service, self._keys, self._cors_origins)
        self.http = HttpServer(app, 1, tls=self._tls)
        door = ZmqServer(context, self.address, service, self._keys)
        watching = asyncio.create_task(self._keys.watch())
        door.start()
        asyncio.get_running_loop().call_later(0.05, self._ready.set)
        await self.http.run_on(self._listening)
        watching.cancel()
        await door.stop()
        self.engine.stop()
        for link in links:
            link.close()

    def close(self) -> None:
        self.http.should_exit = True
        self._thread.join(5)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def doors(folder: Path, *, step_s: float = 0.0, **options: Any) -> Iterator[tuple[Doors, FakeTokenizer]]:
    """The doors and the one fake tokenizer behind them."""
    tokenizer = FakeTokenizer(f"ipc://{folder}/tokenizer-0", step_s)
    try:
        running = Doors(folder, **options)
        try:
            yield running, tokenizer
        finally:
            running.close()
    finally:
        tokenizer.close()
