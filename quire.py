"""Quire's public Python face: the client protocol, `Client`, `AsyncClient` and the offline `LLM`.

One self-contained file that needs only msgspec and pyzmq: it may be copied into any program. The server imports the
protocol's structs from here, so that both ends speak from one definition.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import zmq
import zmq.asyncio

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 1024 * 1024  # of a client's frame


class QuireError(Exception):
    """An error with a stable code, as every door of the server reports it.

    Attributes:
        code: stable, machine-readable (the table is in core/errors.py), e.g. "context_length_exceeded".
        message: one sentence that names the field, the value and the fix.
        param: the request field at fault, or None.
        retry_after_s: seconds after which trying again makes sense, or None.
    """

    def __init__(self, code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the output must be; exactly one field besides `source` is set.

    `json`: a JSON Schema, as a dict or its JSON text. `json_object`: any JSON object. `regex`: the whole output.
    `choice`: one of these texts. `grammar`: a Lark grammar, or one in GBNF (`root ::= …`).
    `source`: the request's field that this came from, which errors then name.
    """

    json: dict[str, Any] | bool | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    source: str = "structured_outputs"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a sequence ends. `core.sampling.validate` checks the ranges.

    temperature 0 is greedy. top_k 0 and top_p 1 and min_p 0 mean "off". Penalties as OpenAI (presence, frequency, over
    output tokens) and as Hugging Face (repetition, over prompt and output). `logprobs`/`prompt_logprobs`: number of
    alternatives (0: the chosen token's only), None: off. `seed` None: the server draws one.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None


# ------------------------------------------------------------------------------------------------ the client protocol
#
# A DEALER socket to the server's ROUTER. A frame is one ZeroMQ part: a msgpack list of the maps below, each with its
# "type". A client says hello first. `id` is the client's own name for a request; each request that the server takes
# gets exactly one ending: finished, models, stats or error. Unknown map keys are ignored, so new ones may be added.


class _Wire(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    """Base of everything that a client and the server say to each other."""


class Hello(_Wire, frozen=True, tag="hello"):
    """Must be a client's first message; may stand at the head of any frame.

    Sent while waiting it asks whether the server still lives, and `running` names the requests that are waited for:
    those that the server does not know (it was restarted) end with an error. `api_key` where the server asks for one;
    without a valid one, hello and every request are answered with the error "invalid_api_key".
    """

    protocol: int
    client: str = ""
    running: list[str] = []
    api_key: str = ""


class GenerateRequest(_Wire, frozen=True, tag="generate"):
    """Generate from exactly one of `prompt` (text or token ids) and `messages` (a chat, as OpenAI's).

    `model` "" means the only model; `sampling` None the model's own defaults. `user`: whose share of the server
    it takes, among those with the same API key.
    """

    id: str
    model: str = ""
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    sampling: SamplingParams | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None
    want_text: bool = True
    want_prompt: bool = False
    user: str = ""


class AbortRequest(_Wire, frozen=True, tag="abort"):
    """End request `id` now; its ending is an error "aborted". A request that has ended already is left alone."""

    id: str


class ModelsRequest(_Wire, frozen=True, tag="models"):
    """Which models are served?"""

    id: str


class StatsRequest(_Wire, frozen=True, tag="stats"):
    """The server's figures, as on GET /stats."""

    id: str


ClientMessage = Hello | GenerateRequest | AbortRequest | ModelsRequest | StatsRequest


class Welcome(_Wire, frozen=True, tag="welcome"):
    """The answer to Hello."""

    protocol: int
    server: str
    models: list[str] = []


class Started(_Wire, frozen=True, tag="started"):
    """The prompt was tokenized; ids and text only with `want_prompt`."""

    id: str
    prompt_tokens: int
    prompt_ids: list[int] = []
    prompt_text: str = ""


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """A token's text, its bytes (text may be empty inside a UTF-8 character), natural log-probability and rank.

    `top` lists the alternatives as (id, text, bytes, logprob), the most probable first.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float
    rank: int = 0
    top: list[tuple[int, str, bytes, float]] = []


class Tokens(_Wire, frozen=True, tag="tokens"):
    """News of one choice: new text and token ids, `first` being the index of token_ids[0]. Text may lag behind ids."""

    id: str
    choice: int = 0
    first: int = 0
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TokenLogprob | None] = []


class Finished(_Wire, frozen=True, tag="finished"):
    """An ending: every choice has its finish_reason."""

    id: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Models(_Wire, frozen=True, tag="models"):
    """The answer to ModelsRequest: as `data` of GET /v1/models."""

    id: str
    models: list[dict[str, Any]]


class Stats(_Wire, frozen=True, tag="stats"):
    """The answer to StatsRequest."""

    id: str
    stats: dict[str, Any]


class Error(_Wire, frozen=True, tag="error"):
    """An ending that went wrong. `id` "" when no request can be named (a malformed frame, a wrong version)."""

    id: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


ServerMessage = Welcome | Started | Tokens | Finished | Models | Stats | Error


# ------------------------------------------------------------------------------------------------ what a client gets


class Choice(msgspec.Struct):
    """One answer. finish_reason: "stop" or "length"; stop_reason: the stop string or stop token id that ended it."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Completion(msgspec.Struct):
    """All that one request gave. `text` is the first choice's."""

    id: str
    choices: list[Choice]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_ids: list[int] = []
    prompt_text: str = ""
    prompt_logprobs: list[TokenLogprob | None] = []

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    def add(self, message: Started | Tokens | Finished) -> None:
        """Take in a message of this request."""
        match message:
            case Tokens():
                choice = self.choices[message.choice]
                choice.text += message.text
                choice.token_ids += message.token_ids
                choice.logprobs += message.logprobs
                choice.finish_reason = message.finish_reason or choice.finish_reason
                choice.stop_reason = message.stop_reason if message.stop_reason is not None else choice.stop_reason
                self.prompt_logprobs += message.prompt_logprobs
            case Started():
                self.prompt_tokens = message.prompt_tokens
                self.prompt_ids = message.prompt_ids
                self.prompt_text = message.prompt_text
            case Finished():
                self.prompt_tokens = message.prompt_tokens
                self.completion_tokens = message.completion_tokens
                self.cached_tokens = message.cached_tokens


def find_servers() -> list[dict[str, Any]]:
    """This user's running servers, the newest first: each server.json as {url, client_address, pid, model, …}."""
    found: list[tuple[float, dict[str, Any]]] = []
    for path in Path(tempfile.gettempdir(), f"quire-{os.getuid()}").glob("*/server.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if path.stat().st_uid != os.getuid():
                continue
            server = json.loads(path.read_text())
            os.kill(int(server["pid"]), 0)  # raises when that process is gone
            found.append((path.stat().st_mtime, server))
    return [server for _, server in sorted(found, key=lambda item: item[0], reverse=True)]


def default_api_key(environment: Mapping[str, str] = os.environ) -> str:
    """The first key in QUIRE_API_KEY; "" without any."""
    return environment.get("QUIRE_API_KEY", "").partition(",")[0].strip()


def _find_address() -> str:
    servers = find_servers()
    if not servers:
        raise QuireError(
            "not_found", "no running Quire server was found; start one with `quire serve`, or pass address="
        )
    return str(servers[0]["client_address"])


# ------------------------------------------------------------------------------------------------ clients

_HEARTBEAT_S = 2.0  # a client that hears nothing asks this often whether the server lives …
_DEAD_S = 15.0  # … and gives up after this long without any answer
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[ServerMessage]] = msgspec.msgpack.Decoder(list[ServerMessage])
_numbers = itertools.count(1)


class _Session:
    """The protocol without a socket, shared by both clients: what was said, and who waits for which answer."""

    def __init__(self, address: str, api_key: str) -> None:
        self.address = address
        self.api_key = api_key
        self.welcome: Welcome | None = None
        self.inboxes: dict[str, deque[ServerMessage]] = {}
        self.failure: QuireError | None = None  # the connection as a whole is unusable
        self.heard_s = time.monotonic()
        self.asked_s = self.heard_s

    def hello(self) -> bytes:
        """The frame that asks whether the server lives and knows what is waited for."""
        self.asked_s = time.monotonic()
        return _encoder.encode([self._hello(list(self.inboxes))])

    def open(self, request: GenerateRequest | ModelsRequest | StatsRequest) -> bytes:
        """Begin to wait for a request's answers; returns the frame to send.

        The hello comes along: ZeroMQ reconnects silently, and a restarted server has not been greeted yet.
        """
        frame = _encoder.encode([self._hello([]), request])
        if len(frame) > MAX_FRAME_BYTES:
            raise QuireError("body_too_large", f"the request takes {len(frame)} bytes; at most {MAX_FRAME_BYTES}")
        if not self.inboxes:
            self.heard_s = time.monotonic()  # silence counts only while something is being waited for
        self.inboxes[request.id] = deque()
        return frame

    def _hello(self, running: list[str]) -> Hello:
        return Hello(protocol=PROTOCOL_VERSION, client="quire.py", running=running, api_key=self.api_key)

    def close(self, request_id: str) -> None:
        self.inboxes.pop(request_id, None)

    def feed(self, frame: bytes) -> None:
        """Take a frame from the server; its messages go to the inboxes of their requests."""
        self.heard_s = time.monotonic()
        try:
            messages = _decoder.decode(frame)
        except msgspec.DecodeError as error:
            self.failure = QuireError(
                "protocol_error", f"the server at {self.address} sent what is no message: {error}"
            )
            return
        for message in messages:
            if isinstance(message, Welcome):
                self.welcome = message
            elif isinstance(message, Error) and not message.id:
                self.failure = QuireError(message.code, message.message, message.param, message.retry_after_s)
            elif (inbox := self.inboxes.get(message.id)) is not None:
                inbox.append(message)

    def next(self, request_id: str) -> ServerMessage | None:
        """The request's next message, None when there is none yet. Raises QuireError for an error of any kind."""
        inbox = self.inboxes[request_id]
        if inbox:
            message = inbox.popleft()
            if isinstance(message, Error):
                raise QuireError(message.code, message.message, message.param, message.retry_after_s)
            return message
        if self.failure is not None:
            raise self.failure
        if time.monotonic() - self.heard_s > _DEAD_S:
            raise QuireError("engine_failed", f"the server at {self.address} does not answer")
        return None

    def heartbeat(self) -> bytes | None:
        """A frame to send when there has been silence for a while, or None."""
        now = time.monotonic()
        return self.hello() if now - max(self.heard_s, self.asked_s) >= _HEARTBEAT_S else None


def _socket(context: zmq.Context[Any], address: str) -> Any:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 200)  # long enough for a last abort to leave
    socket.connect(address)
    return socket


def _generate_request(
    model: str | None,
    prompt: str | Sequence[int] | None,
    messages: Sequence[dict[str, Any]] | None,
    sampling: SamplingParams | None,
    options: dict[str, Any],
) -> GenerateRequest:
    if (prompt is None) == (messages is None):
        raise QuireError("invalid_request", "give exactly one of prompt and messages", "prompt")
    return GenerateRequest(
        id=f"r{next(_numbers)}",
        model=model or "",
        prompt=prompt if prompt is None or isinstance(prompt, str) else list(prompt),
        messages=None if messages is None else list(messages),
        sampling=sampling,
        **options,
    )


def _empty(request: GenerateRequest) -> Completion:
    count = request.sampling.n if request.sampling is not None else 1
    return Completion(request.id, [Choice(index) for index in range(max(1, count))])


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _timed_out(timeout_s: float | None) -> QuireError:
    return QuireError("deadline_exceeded", f"no ending within timeout_s={timeout_s}; the request was aborted")


class Client:
    """A connection to a running server, for one thread.

    Args:
        address: the server's ZeroMQ address; None finds this user's newest running server.
        timeout_s: how long a request may take by default; None: as long as it needs.
        api_key: for a server with keys; None takes QUIRE_API_KEY, the first where it has several.

    Methods raise QuireError. Use it as a context manager, or call `close`.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float | None = None, api_key: str | None = None
    ) -> None:
        self.address = address or _find_address()
        self.timeout_s = timeout_s
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = _socket(self._context, self.address)
        self._session = _Session(self.address, default_api_key() if api_key is None else api_key)

    def generate(
        self,
        model: str | None = None,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[dict[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Completion:
        """Generate and wait for the end. `options`: further fields of GenerateRequest (tools, priority, …)."""
        with self.stream(model, prompt, messages=messages, sampling=sampling, timeout_s=timeout_s, **options) as stream:
            for _ in stream:
                pass
            return stream.completion

    def generate_all(
        self,
        model: str | None,
        prompts: Sequence[str | Sequence[int] | Sequence[dict[str, Any]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        max_running: int = 512,
        on_done: Callable[[int, Completion], None] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Generate for many prompts together (text, token ids, or a chat's messages each), in their order.

        At most `max_running` are on their way at a time; `on_done(index, completion)` is called as each one ends. The
        first error aborts the others and is raised.
        """
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(each) != len(prompts):
            raise QuireError("invalid_value", f"{len(each)} sampling parameters for {len(prompts)} prompts", "sampling")
        results: list[Completion | None] = [None] * len(prompts)
        waiting = iter(range(len(prompts)))
        running: dict[int, Stream] = {}
        try:
            while True:
                for index in itertools.islice(waiting, max(0, max_running - len(running))):
                    prompt = prompts[index]
                    chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], dict)
                    text: Any = None if chat else prompt
                    talk: Any = prompt if chat else None
                    running[index] = self.stream(model, text, messages=talk, sampling=each[index], **options)
                if not running:
                    return [result for result in results if result is not None]
                self._pump(None)
                for index in [index for index, stream in running.items() if stream.take()]:
                    completion = results[index] = running.pop(index).completion
                    if on_done is not None:
                        on_done(index, completion)
        finally:
            for stream in running.values():
                stream.close()

    def stream(
        self,
        model: str | None = None,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[dict[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Stream:
        """Begin to generate: iterate over the Tokens as they come. Leaving early aborts. Streams may interleave."""
        request = _generate_request(model, prompt, messages, sampling, options)
        self._socket.send(self._session.open(request))
        return Stream(self, request, timeout_s if timeout_s is not None else self.timeout_s)

    def abort(self, request_id: str) -> None:
        """End a request now; whoever reads its stream gets the error "aborted"."""
        self._socket.send(_encoder.encode([AbortRequest(id=request_id)]))

    def models(self) -> list[dict[str, Any]]:
        """The served models."""
        reply = self._ask(ModelsRequest(id=f"r{next(_numbers)}"))
        assert isinstance(reply, Models)
        return reply.models

    def stats(self) -> dict[str, Any]:
        """The server's figures, as on GET /stats."""
        reply = self._ask(StatsRequest(id=f"r{next(_numbers)}"))
        assert isinstance(reply, Stats)
        return reply.stats

    def close(self) -> None:
        """Abort what still runs and disconnect."""
        if self._socket.closed:
            return
        if self._session.inboxes:
            self._socket.send(_encoder.encode([AbortRequest(id=request_id) for request_id in self._session.inboxes]))
        self._socket.close()
        self._context.term()

    def _ask(self, request: ModelsRequest | StatsRequest) -> ServerMessage:
        deadline = _deadline(self.timeout_s)
        frame = self._session.open(request)
        try:
            self._socket.send(frame)
            while (reply := self._session.next(request.id)) is None:
                if not self._pump(deadline):
                    raise _timed_out(self.timeout_s)
            return reply
        finally:
            self._session.close(request.id)

    def _pump(self, deadline: float | None) -> bool:
        """Wait for a frame, at most a heartbeat long, and take all that is there; False when the deadline passed."""
        wait_s = _HEARTBEAT_S if deadline is None else min(_HEARTBEAT_S, deadline - time.monotonic())
        if wait_s <= 0:
            return False
        if self._socket.poll(max(1, int(wait_s * 1000))):
            with contextlib.suppress(zmq.Again):
                while True:
                    self._session.feed(self._socket.recv(zmq.NOBLOCK))
        if (frame := self._session.heartbeat()) is not None:
            self._socket.send(frame)
        return True

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(contextlib.AbstractContextManager["Stream"]):
    """The Tokens of one request, as they come. `completion` gathers them; `id` is what `Client.abort` takes."""

    def __init__(self, client: Client, request: GenerateRequest, timeout_s: float | None) -> None:
        self.id = request.id
        self.completion = _empty(request)
        self._client = client
        self._timeout_s = timeout_s
        self._deadline = _deadline(timeout_s)
        self._open = True

    def __iter__(self) -> Iterator[Tokens]:
        return self

    def __next__(self) -> Tokens:
        while self._open:
            message = self._next()
            if isinstance(message, Tokens):
                return message
            if message is None and not self._client._pump(self._deadline):
                self.close()
                raise _timed_out(self._timeout_s)
        raise StopIteration

    def take(self) -> bool:
        """Take in what has already come, without waiting; True when the request has ended."""
        while self._open and self._next() is not None:
            pass
        return not self._open

    def close(self) -> None:
        """Abort the request, unless it has ended."""
        if self._open:
            self._open = False
            self._client._session.close(self.id)
            self._client.abort(self.id)

    def _next(self) -> Tokens | Started | Finished | None:
        try:
            message = self._client._session.next(self.id)
        except QuireError:
            self._open = False
            self._client._session.close(self.id)
            raise
        if message is None:
            return None
        assert isinstance(message, Tokens | Started | Finished)
        self.completion.add(message)
        if isinstance(message, Finished):
            self._open = False
            self._client._session.close(self.id)
        return message

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """As `Client`, for asyncio: any number of tasks of one event loop may share it. Use `async with`."""

    def __init__(
        self, address: str | None = None, *, timeout_s: float | None = None, api_key: str | None = None
    ) -> None:
        self.address = address or _find_address()
        self.timeout_s = timeout_s
        self._context = zmq.asyncio.Context()
        self._socket = _socket(self._context, self.address)
        self._session = _Session(self.address, default_api_key() if api_key is None else api_key)
        self._news: dict[str, asyncio.Event] = {}
        self._reader: asyncio.Task[None] | None = None

    async def generate(
        self,
        model: str | None = None,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[dict[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Completion:
        """Generate and wait for the end. Cancelling aborts."""
        request = _generate_request(model, prompt, messages, sampling, options)
        completion = _empty(request)
        async for message in self._messages(request, timeout_s):
            assert isinstance(message, Started | Tokens | Finished)
            completion.add(message)
        return completion

    async def stream(
        self,
        model: str | None = None,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[dict[str, Any]] | None = None,
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Tokens, None]:
        """Yield the Tokens as they come. Closing the iterator (`contextlib.aclosing`) or cancelling aborts."""
        request = _generate_request(model, prompt, messages, sampling, options)
        async with contextlib.aclosing(self._messages(request, timeout_s)) as all_messages:
            async for message in all_messages:
                if isinstance(message, Tokens):
                    yield message

    async def abort(self, request_id: str) -> None:
        """End a request now; whoever reads it gets the error "aborted"."""
        await self._socket.send(_encoder.encode([AbortRequest(id=request_id)]))

    async def models(self) -> list[dict[str, Any]]:
        """The served models."""
        async for reply in self._messages(ModelsRequest(id=f"r{next(_numbers)}"), None):
            assert isinstance(reply, Models)
            return reply.models
        raise AssertionError("no answer and no error")

    async def stats(self) -> dict[str, Any]:
        """The server's figures, as on GET /stats."""
        async for reply in self._messages(StatsRequest(id=f"r{next(_numbers)}"), None):
            assert isinstance(reply, Stats)
            return reply.stats
        raise AssertionError("no answer and no error")

    async def close(self) -> None:
        """Abort what still runs and disconnect."""
        if self._socket.closed:
            return
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        if self._session.inboxes:
            aborts = [AbortRequest(id=request_id) for request_id in self._session.inboxes]
            await self._socket.send(_encoder.encode(aborts))
        self._socket.close()
        self._context.term()

    async def _messages(
        self, request: GenerateRequest | ModelsRequest | StatsRequest, timeout_s: float | None
    ) -> AsyncGenerator[ServerMessage, None]:
        """Send a request and yield its messages up to its ending; abort when left before."""
        timeout_s = timeout_s if timeout_s is not None else self.timeout_s
        deadline = _deadline(timeout_s)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read())
        frame = self._session.open(request)
        news = self._news[request.id] = asyncio.Event()
        ended = False
        try:
            await self._socket.send(frame)
            while not ended:
                try:
                    message = self._session.next(request.id)
                except QuireError:
                    ended = True
                    raise
                if message is None:
                    news.clear()
                    try:
                        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                            await news.wait()
                    except TimeoutError:
                        raise _timed_out(timeout_s) from None
                    continue
                ended = not isinstance(message, Started | Tokens)
                yield message
        finally:
            self._session.close(request.id)
            del self._news[request.id]
            if not ended and not self._socket.closed:
                self._socket.send(_encoder.encode([AbortRequest(id=request.id)]))

    async def _read(self) -> None:
        """The one reader of the socket: feed the session, wake those who have news, keep the heartbeat."""
        while True:
            if await self._socket.poll(int(_HEARTBEAT_S * 1000)):
                self._session.feed(await self._socket.recv())
            if (frame := self._session.heartbeat()) is not None:
                await self._socket.send(frame)
            silent = time.monotonic() - self._session.heard_s > _HEARTBEAT_S or self._session.failure is not None
            for request_id, event in self._news.items():
                if silent or self._session.inboxes[request_id]:
                    event.set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# ------------------------------------------------------------------------------------------------ offline

_START_S = 600.0  # a large checkpoint is read from a slow disk in minutes


class LLM:
    """An engine of one's own, without a server to look after: started as a subprocess, ended with the program.

    Args:
        model: built-in name, folder or hub id.
        options: options of `quire serve`, with underscores: LLM("tiny-chat", max_num_seqs=64, quantization="int8").

    Raises QuireError("engine_failed") with the engine's own last words when it does not start.
    """

    def __init__(self, model: str = "tiny-chat", **options: Any) -> None:
        command = [sys.executable, "-P", "-m", "tools.cli", "serve", model, "--port", "0", "--die-with-parent"]
        environment = dict(os.environ)
        for name, value in options.items():
            flag = "--" + name.replace("_", "-")
            if name == "api_key":
                environment["QUIRE_API_KEY"] = str(value)  # a command line can be read by everybody
            else:
                command += [flag] if value is True else ["--no-" + flag[2:]] if value is False else [flag, str(value)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the engine
        # A session of its own: the program's Ctrl-C interrupts the program, which then ends the engine in order.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=environment,
        )
        try:
            self.client = Client(self._wait(), api_key=default_api_key(environment))
        except BaseException:
            self.close()
            raise

    def _wait(self) -> str:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            for server in find_servers():
                if server["pid"] == self._process.pid:
                    return str(server["client_address"])
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        self._log.seek(0)
        words = self._log.read().decode("utf-8", "replace").strip().splitlines()[-12:]
        raise QuireError("engine_failed", "the engine did not start:\n" + "\n".join(words))

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int] | Sequence[dict[str, Any]]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        **options: Any,
    ) -> list[Completion]:
        """Completions of all prompts (text, token ids, or a chat's messages each), in their order.

        `progress` draws a bar on stderr when that is a terminal. `options`: further fields of GenerateRequest.
        """
        batch: Sequence[Any] = [prompts] if isinstance(prompts, str) else prompts
        bar = _Bar(len(batch)) if progress and sys.stderr.isatty() else None
        results = self.client.generate_all(None, batch, sampling, on_done=bar, **options)
        if bar is not None:
            bar.end()
        return results

    def chat(
        self, messages: Sequence[dict[str, Any]], sampling: SamplingParams | None = None, **options: Any
    ) -> Completion:
        """One answer to a conversation."""
        return self.client.generate(messages=messages, sampling=sampling, **options)

    def close(self) -> None:
        """End the engine and wait for it."""
        client = getattr(self, "client", None)
        if client is not None:
            client.close()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Bar:
    """Progress on stderr: done of all, tokens per second."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.tokens = 0
        self.began = time.monotonic()

    def __call__(self, index: int, completion: Completion) -> None:
        self.done += 1
        self.tokens += completion.completion_tokens
        filled = 30 * self.done // max(1, self.total)
        rate = self.tokens / max(1e-6, time.monotonic() - self.began)
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r[{bar}] {self.done}/{self.total}  {rate:,.0f} tokens/s ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        print(file=sys.stderr)
