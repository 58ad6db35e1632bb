"""Channel: named peers, handover of a name, and errors instead of silent loss."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from core import channel
from core.channel import ChannelFull, Client, PeerGone, Server
from core.messages import Abort, FromTokenizer, Generate, Started, Stop, TextPrompt, ToTokenizer
from quire import SamplingParams

WAIT_S = 10.0


class Wires:
    """Makes ends of one channel and closes them."""

    def __init__(self, address: str, context: zmq.Context[Any]) -> None:
        self.address = address
        self.context = context
        self._made: list[Any] = []

    def server(self) -> Server[Any]:
        made: Server[Any] = Server(self.context, self.address, ToTokenizer)
        self._made.append(made)
        return made

    def client(self, name: str = "api-0") -> Client[Any]:
        made: Client[Any] = Client(self.context, self.address, FromTokenizer, name=name)
        self._made.append(made)
        return made

    def close(self) -> None:
        for end in self._made:
            end.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def address() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:  # short: the kernel limits a socket's path
        yield f"ipc://{Path(folder)}/door"


@pytest.fixture
def wires(address: str) -> Iterator[Wires]:
    made = Wires(address, zmq.Context())
    yield made
    made.close()


def test_frames_carry_typed_messages_both_ways(wires: Wires) -> None:
    server = wires.server()
    client = wires.client()
    sent = [Generate("r1", "m@1", TextPrompt("hé"), SamplingParams(seed=3)), Abort("r0")]
    client.send(sent)
    assert server.receive(WAIT_S) == ("api-0", sent)
    server.send("api-0", [Started("r1", 4)])
    assert client.receive(WAIT_S) == [Started("r1", 4)]
    assert client.receive(0) is None
    assert server.receive(0.01) is None


def test_a_restarted_peer_takes_over_its_name(wires: Wires) -> None:
    server = wires.server()
    old = wires.client()
    old.send([Abort("old")])
    assert server.receive(WAIT_S) == ("api-0", [Abort("old")])
    new = wires.client()
    new.send([Abort("new")])
    assert server.receive(WAIT_S) == ("api-0", [Abort("new")])
    server.send("api-0", [Started("r1", 4)])
    assert new.receive(WAIT_S) == [Started("r1", 4)]
    assert old.receive(0.05) is None


def test_a_frame_for_nobody_raises(wires: Wires) -> None:
    server = wires.server()
    with pytest.raises(PeerGone, match="api-7"):
        server.send("api-7", [Started("r1", 4)])


def test_a_full_queue_raises(wires: Wires, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_QUEUED_FRAMES", 10)
    client = wires.client()  # nobody has bound the address

    def flood() -> None:
        for _ in range(1000):
            client.send([Abort("r")])

    with pytest.raises(ChannelFull):
        flood()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"no msgpack at all",
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode([["Unknown", "r1"]]),
        msgspec.msgpack.encode([Stop("r1", 0)]),  # of another channel's union
        msgspec.msgpack.encode([["Abort", 5]]),
    ],
)
def test_a_malformed_frame_raises_and_the_next_is_read(wires: Wires, payload: bytes) -> None:
    server = wires.server()
    client = wires.client()
    client.socket.send(payload)
    client.send([Abort("r2")])
    with pytest.raises(msgspec.DecodeError):  # of which ValidationError is one kind
        server.receive(WAIT_S)
    assert server.receive(WAIT_S) == ("api-0", [Abort("r2")])


async def test_the_same_on_asyncio(address: str) -> None:
    wires = Wires(address, zmq.asyncio.Context())
    server = wires.server()
    client = wires.client()
    await client.asend([Abort("r1")])
    assert await server.areceive() == ("api-0", [Abort("r1")])
    await server.asend("api-0", [Started("r1", 4)])
    assert await client.areceive() == [Started("r1", 4)]
    with pytest.raises(PeerGone):
        await server.asend("api-1", [Started("r1", 4)])
    wires.close()


def test_only_this_user_may_open_a_socket(wires: Wires) -> None:
    before = os.umask(0)
    try:
        wires.server()
        assert os.umask(0) == 0  # as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(wires.address.removeprefix("ipc://")).st_mode) == 0o600
