"""Channel: the one wrapper around ZeroMQ. A typed socket whose frames are lists of messages.

A server side (`bind`) is a ROUTER and knows its peers by name; a client side (`connect`) is a DEALER with a name.
Names make a peer's restart harmless: the new process takes the old one's place (ROUTER_HANDOVER).
"""

from __future__ import annotations

import os
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
MAX_QUEUED_FRAMES = 100_000  # per peer; a full queue is an error that is raised, never a silent drop


class ChannelFull(Exception):
    """A peer does not read: its queue of frames is full."""


class PeerGone(Exception):
    """A frame is for a peer that is not connected."""


def _options(socket: zmq.Socket[Any], *, name: str | None, router: bool) -> None:
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.SNDHWM, MAX_QUEUED_FRAMES)
    socket.setsockopt(zmq.RCVHWM, MAX_QUEUED_FRAMES)
    if name is not None:
        socket.setsockopt(zmq.IDENTITY, name.encode())
    if router:
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)


def bind_private(socket: zmq.Socket[Any], address: str) -> None:
    """Bind to an ipc:// address whose file only this user may open, from its first moment on."""
    mask = os.umask(0o177)
    try:
        socket.bind(address)
    finally:
        os.umask(mask)


class Server(Generic[T]):
    """Binds `address`; receives frames of `T` from named peers and answers them by name.

    Args:
        context: the process's ZeroMQ context (zmq.Context, or zmq.asyncio.Context for the `a…` methods).
        address: "ipc:///path".
        union: the union type of what is received, e.g. `messages.ToTokenizer`.
    """

    def __init__(self, context: zmq.Context[Any], address: str, union: Any) -> None:
        self.socket = context.socket(zmq.ROUTER)
        _options(self.socket, name=None, router=True)
        bind_private(self.socket, address)
        self._decoder: msgspec.msgpack.Decoder[list[T]] = msgspec.msgpack.Decoder(list[union])

    def receive(self, timeout_s: float | None = None) -> tuple[str, list[T]] | None:
        """The next frame as (peer name, messages); None after `timeout_s` (0: at once; None: wait for ever).

        Raises msgspec.ValidationError for a malformed frame.
        """
        if timeout_s is not None and not self.socket.poll(max(0, int(timeout_s * 1000))):
            return None
        name, payload = self.socket.recv_multipart()
        return name.decode(), self._decoder.decode(payload)

    def send(self, peer: str, messages: list[Any]) -> None:
        """Queue one frame for `peer`. Raises PeerGone or ChannelFull; never blocks, never drops silently."""
        try:
            self.socket.send_multipart([peer.encode(), _encoder.encode(messages)], zmq.NOBLOCK)
        except zmq.Again as error:
            raise ChannelFull(peer) from error
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone(peer) from error
            raise

    async def areceive(self) -> tuple[str, list[T]]:
        """As `receive`, on a zmq.asyncio context."""
        name, payload = await self.socket.recv_multipart()
        return name.decode(), self._decoder.decode(payload)

    async def asend(self, peer: str, messages: list[Any]) -> None:
        """As `send`, on a zmq.asyncio context."""
        try:
            await self.socket.send_multipart([peer.encode(), _encoder.encode(messages)], zmq.NOBLOCK)
        except zmq.Again as error:
            raise ChannelFull(peer) from error
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGone(peer) from error
            raise

    def close(self) -> None:
        self.socket.close()


class Client(Generic[T]):
    """Connects to a Server at `address` under `name`; ZeroMQ reconnects by itself after the server's restart."""

    def __init__(self, context: zmq.Context[Any], address: str, union: Any, *, name: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        _options(self.socket, name=name, router=False)
        self.socket.connect(address)
        self._decoder: msgspec.msgpack.Decoder[list[T]] = msgspec.msgpack.Decoder(list[union])

    def receive(self, timeout_s: float | None = None) -> list[T] | None:
        """The next frame's messages; None after `timeout_s` (0: at once; None: wait for ever)."""
        if timeout_s is not None and not self.socket.poll(max(0, int(timeout_s * 1000))):
            return None
        return self._decoder.decode(self.socket.recv())

    def send(self, messages: list[Any]) -> None:
        """Queue one frame. Raises ChannelFull when the server has not read for too long."""
        try:
            self.socket.send(_encoder.encode(messages), zmq.NOBLOCK)
        except zmq.Again as error:
            raise ChannelFull(str(self.socket.LAST_ENDPOINT)) from error

    async def areceive(self) -> list[T]:
        """As `receive`, on a zmq.asyncio context."""
        return self._decoder.decode(await self.socket.recv())

    async def asend(self, messages: list[Any]) -> None:
        """As `send`, on a zmq.asyncio context."""
        try:
            await self.socket.send(_encoder.encode(messages), zmq.NOBLOCK)
        except zmq.Again as error:
            raise ChannelFull("server") from error

    def close(self) -> None:
        self.socket.close()
