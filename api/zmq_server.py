"""The ZeroMQ door: the public client protocol of quire.py over the same EngineClient as HTTP.

One ROUTER socket. What several requests of a client have to say in one turn of the loop leaves as one frame.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path
from typing import Any

import msgspec
import zmq

import quire
from api.engine_client import Event
from api.keys import Keys
from api.routes.stats import stats_of
from api.schema.chat import chat_prompt
from api.schema.completions import check_token_ids
from api.schema.deadline import deadline_s
from api.schema.models import model_card
from api.schema.parse import explain
from api.schema.sampling import short_name
from api.service import Service
from core.channel import bind_private
from core.errors import QuireError
from core.messages import Delta, Finished, Prompt, Started, TextPrompt, TokensPrompt, TokenText
from core.sampling import validate

log = logging.getLogger("quire.api")

MAX_FRAMES_PER_TURN = 64
MAX_OUTBOX = 8192  # messages that wait for a client which does not read
MAX_UNREAD_FRAMES = 200  # per client, inside ZeroMQ; a step is one frame
RETRY_S = 0.05  # a full socket is tried again after this long
MAX_GREETED = 10_000  # clients whose hello is remembered
_NO_KEY = "the API key is missing or wrong; pass api_key= to the client, or set QUIRE_API_KEY"

Request = quire.GenerateRequest | quire.ModelsRequest | quire.StatsRequest

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[list[quire.ClientMessage]] = msgspec.msgpack.Decoder(list[quire.ClientMessage])


class Peer:
    """A connected client: what it runs, and what is still to be sent to it."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity
        self.tasks: dict[str, asyncio.Task[quire.ServerMessage]] = {}
        self.outbox: list[quire.ServerMessage] = []
        self.flushing = False
        self.too_slow = False


class ZmqServer:
    """Binds `address` and serves until `stop`.

    Args:
        context: the process's ZeroMQ context.
        address: "ipc://…"; only this user may open the socket file.
        service: engine, model, figures.
        keys: what a hello must bring.
    """

    def __init__(self, context: zmq.Context[Any], address: str, service: Service, keys: Keys) -> None:
        self._service = service
        self._keys = keys
        self._peers: dict[bytes, Peer] = {}
        self._greeted: dict[bytes, str] = {}  # whose key it showed; "" where the server has none
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a client that is gone is an error, not a silent drop
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNREAD_FRAMES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, quire.MAX_FRAME_BYTES)
        bind_private(self._socket, address)
        self._address = address

    def start(self) -> None:
        """Begin to read on the running event loop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.getsockopt(zmq.FD), self._read)
        loop.call_soon(self._read)

    async def stop(self) -> None:
        """End what runs, tell the clients, close."""
        tasks = [task for peer in self._peers.values() for task in peer.tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the endings are said by callbacks of the tasks
        asyncio.get_running_loop().remove_reader(self._socket.getsockopt(zmq.FD))
        for peer in list(self._peers.values()):
            self._flush(peer)
        self._socket.close()
        # ZeroMQ leaves the file; by now its own thread may still be closing the socket, which does not need it.
        Path(self._address.removeprefix("ipc://")).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ receive

    def _read(self) -> None:
        for _ in range(MAX_FRAMES_PER_TURN):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:  # Again: nothing more; or closed between the wake-up and this call
                return
            self._frame(parts)
        asyncio.get_running_loop().call_soon(self._read)

    def _frame(self, parts: list[bytes]) -> None:
        peer = self._peers.get(parts[0]) or Peer(parts[0])
        if len(parts) != 2:
            self._say(peer, _protocol_error(f"a frame has one part; this one has {len(parts) - 1}"))
            return
        try:
            messages = _decoder.decode(parts[1])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            messages = self._salvage(peer, parts[1], error)
        for message in messages:
            self._take(peer, message)

    def _salvage(self, peer: Peer, frame: bytes, error: Exception) -> list[quire.ClientMessage]:
        """What is valid of a malformed frame; the rest is answered, by its id where it has one."""
        try:
            items = msgspec.msgpack.decode(frame)
        except Exception:  # the bytes are anybody's
            items = None
        if not isinstance(items, list):
            self._say(peer, _protocol_error(f"the frame is no msgpack list of messages: {error}"))
            return []
        valid: list[quire.ClientMessage] = []
        for item in items:
            try:
                valid.append(msgspec.convert(item, quire.ClientMessage))
            except (msgspec.ValidationError, RecursionError) as reason:
                request_id = item.get("id") if isinstance(item, dict) else None
                if isinstance(request_id, str) and request_id:
                    self._say(peer, _malformed(request_id, reason))
                else:
                    self._say(peer, _protocol_error(f"a message is malformed: {reason}"))
        return valid

    def _take(self, peer: Peer, message: quire.ClientMessage) -> None:
        if isinstance(message, quire.Hello):
            self._greet(peer, message)
        elif isinstance(message, quire.AbortRequest):
            if (task := peer.tasks.get(message.id)) is not None:
                task.cancel()
        elif (refusal := self._refusal(peer)) is not None:
            self._service.count_error(refusal.code)
            self._say(peer, quire.Error(id=message.id, code=refusal.code, message=refusal.message))
        elif not message.id or len(message.id) > 200 or message.id in peer.tasks:
            text = "id must be 1 to 200 characters, and of no other running request"
            self._say(peer, _protocol_error(text))
        else:
            self._peers[peer.identity] = peer
            task = peer.tasks[message.id] = asyncio.get_running_loop().create_task(self._serve(peer, message))
            task.add_done_callback(functools.partial(self._ended, peer, message.id))

    def _refusal(self, peer: Peer) -> QuireError | None:
        """Why a client's requests are not served: it has not said hello, or its key is none any more."""
        holder = self._greeted.get(peer.identity)
        if not self._keys.required:
            text = f"say hello first, with protocol {quire.PROTOCOL_VERSION}"
            return None if holder is not None else QuireError("protocol_error", text)
        if holder is None:
            return QuireError("invalid_api_key", _NO_KEY)
        if not self._keys.holds(holder):
            return QuireError("invalid_api_key", "the API key is no longer valid")
        return None

    def _greet(self, peer: Peer, hello: quire.Hello) -> None:
        if hello.protocol != quire.PROTOCOL_VERSION:
            text = (
                f"this server ({self._service.version}) speaks protocol {quire.PROTOCOL_VERSION}, the client "
                f"{hello.protocol}; use the quire.py of the server's version"
            )
            self._say(peer, _protocol_error(text))
            return
        self._greeted.pop(peer.identity, None)
        if self._keys.required:
            if not peer.identity.startswith(b"\0"):
                # Once it has left, anybody could come back under a name of its own choice, and need no key.
                text = "with API keys, a client must not set its ZeroMQ identity"
                self._say(peer, _protocol_error(text))
                return
            holder = self._keys.holder(hello.api_key.encode())
            if holder is None:
                self._say(peer, quire.Error(id="", code="invalid_api_key", message=_NO_KEY))
                return
            self._greeted[peer.identity] = holder
        else:
            self._greeted[peer.identity] = ""
        if len(self._greeted) > MAX_GREETED:
            del self._greeted[next(identity for identity in self._greeted if identity not in self._peers)]
        models = [self._service.model.name]
        self._say(peer, quire.Welcome(protocol=quire.PROTOCOL_VERSION, server=self._service.version, models=models))
        waiting = {message.id for message in peer.outbox if isinstance(message, quire.Finished | quire.Error)}
        for request_id in hello.running:
            if request_id not in peer.tasks and request_id not in waiting:
                text = "the server does not know this request; it was probably restarted"
                self._say(peer, quire.Error(id=request_id, code="engine_failed", message=text))

    # ------------------------------------------------------------------------------------------ serve

    async def _serve(self, peer: Peer, message: Request) -> quire.ServerMessage:
        """One request from its beginning to its ending, which is returned."""
        try:
            match message:
                case quire.GenerateRequest():
                    return await self._generate(peer, message)
                case quire.ModelsRequest(id=request_id):
                    card = msgspec.to_builtins(model_card(self._service.model))
                    return quire.Models(id=request_id, models=[card])
                case quire.StatsRequest(id=request_id):
                    return quire.Stats(id=request_id, stats=stats_of(await self._service.figures.query()))
        except QuireError as error:
            return quire.Error(
                id=message.id,
                code=error.code,
                message=error.message,
                param=error.param,
                retry_after_s=error.retry_after_s,
            )
        except Exception:
            log.exception("request %s of a ZeroMQ client failed", message.id)
            return quire.Error(id=message.id, code="internal_error", message="an unexpected error; see the log")

    def _ended(self, peer: Peer, request_id: str, task: asyncio.Task[quire.ServerMessage]) -> None:
        """Say a request's ending: the only place that does, also for a task that was cancelled before it began."""
        del peer.tasks[request_id]
        if not task.cancelled():
            ending = task.result()
            if isinstance(ending, quire.Error):
                self._service.count_error(ending.code)
            self._say(peer, ending)
        elif peer.too_slow:
            text = f"{MAX_OUTBOX} messages were waiting to be read; the request was aborted"
            self._say(peer, quire.Error(id=request_id, code="client_too_slow", message=text))
        else:
            self._say(peer, quire.Error(id=request_id, code="aborted", message="the request was aborted"))

    async def _generate(self, peer: Peer, message: quire.GenerateRequest) -> quire.ServerMessage:
        service = self._service
        service.model.check_name(message.model or None)
        sampling = validate(message.sampling or service.model.defaults, service.model.limits)
        if not -(2**31) <= message.priority < 2**31:
            raise QuireError("invalid_value", "priority must fit in 32 bits", "priority")
        await service.check_ready()
        stream = service.engine.generate(
            [self._prompt(message)],
            sampling,
            priority=message.priority,
            cache_salt=message.cache_salt[:256],
            deadline_s=deadline_s(message.timeout_s),
            want_text=message.want_text,
            want_prompt=message.want_prompt,
            tenant=self._greeted.get(peer.identity, ""),
            user=short_name(message.user),
        )
        async with stream:
            async for news in stream:
                for _, event in news:
                    if isinstance(event, Finished):
                        return _public(message.id, event)
                    self._say(peer, _public(message.id, event))
        raise AssertionError("a stream ended without an ending")

    def _prompt(self, message: quire.GenerateRequest) -> Prompt:
        if (message.prompt is None) == (message.messages is None):
            raise QuireError("invalid_request", "give exactly one of prompt and messages", "prompt")
        if message.messages is not None:
            return chat_prompt(message.messages, message.tools, message.template_kwargs)
        if isinstance(message.prompt, str):
            return TextPrompt(message.prompt)
        ids = message.prompt or []
        check_token_ids(ids, "prompt", self._service.model)
        return TokensPrompt(ids)

    # ------------------------------------------------------------------------------------------ send

    def _say(self, peer: Peer, message: quire.ServerMessage) -> None:
        """Put a message into the client's outbox, which leaves as one frame at the end of this turn of the loop."""
        peer.outbox.append(message)
        if len(peer.outbox) > MAX_OUTBOX and isinstance(message, quire.Tokens):
            self._drop(peer)
        if not peer.flushing:
            peer.flushing = True
            asyncio.get_running_loop().call_soon(self._flush, peer)

    def _drop(self, peer: Peer) -> None:
        """A client that does not read: end its requests, and keep nothing for it but the endings."""
        peer.outbox = [m for m in peer.outbox if not isinstance(m, quire.Tokens | quire.Started)]
        peer.too_slow = True
        for task in peer.tasks.values():
            task.cancel()

    def _flush(self, peer: Peer) -> None:
        peer.flushing = False
        if not peer.outbox or self._socket.closed:
            return
        loop = asyncio.get_running_loop()
        try:
            self._socket.send_multipart([peer.identity, _encoder.encode(peer.outbox)], zmq.NOBLOCK)
        except zmq.Again:
            peer.flushing = True
            loop.call_later(RETRY_S, self._flush, peer)
            return
        except zmq.ZMQError:  # the client is gone
            peer.outbox.clear()
            self._greeted.pop(peer.identity, None)
            for task in peer.tasks.values():
                task.cancel()
            self._peers.pop(peer.identity, None)
            return
        peer.outbox.clear()
        peer.too_slow = False
        if not peer.tasks:
            self._peers.pop(peer.identity, None)
        loop.call_soon(self._read)  # sending may take the socket's edge-triggered readiness with it


def _public(request_id: str, event: Event) -> quire.ServerMessage:
    """An event of the engine in the words of the public protocol."""
    match event:
        case Delta():
            return quire.Tokens(
                id=request_id,
                choice=event.choice,
                first=event.first,
                text=event.text,
                token_ids=event.token_ids,
                logprobs=[_logprob(token) for token in event.logprobs],
                finish_reason=event.finish_reason,
                stop_reason=event.stop_reason,
                prompt_logprobs=[None if token is None else _logprob(token) for token in event.prompt_logprobs],
            )
        case Started():
            return quire.Started(
                id=request_id,
                prompt_tokens=event.prompt_tokens,
                prompt_ids=event.prompt_ids,
                prompt_text=event.prompt_text,
            )
        case Finished():
            return quire.Finished(
                id=request_id,
                prompt_tokens=event.prompt_tokens,
                completion_tokens=event.completion_tokens,
                cached_tokens=event.cached_tokens,
            )


def _logprob(token: TokenText) -> quire.TokenLogprob:
    return quire.TokenLogprob(token.token_id, token.text, token.raw, token.logprob, token.rank, token.top)


def _malformed(request_id: str, reason: Exception) -> quire.Error:
    """The error of a request that can be named."""
    if not isinstance(reason, msgspec.ValidationError):
        return quire.Error(id=request_id, code="invalid_value", message="the request nests too deeply")
    error = explain(reason)
    return quire.Error(id=request_id, code=error.code, message=error.message, param=error.param)


def _protocol_error(text: str) -> quire.Error:
    return quire.Error(id="", code="protocol_error", message=text)
