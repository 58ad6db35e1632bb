"""Acceptor on a real socket under uvloop: all at once, bounded, calm when descriptors run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

import api.acceptor
from api.acceptor import Acceptor
from api.http_server import HttpServer


class CountingSocket(socket.socket):
    """Counts accept calls; fails with `fail` (errnos) first."""

    accepts = 0
    fail: tuple[int, ...] = ()

    def accept(self) -> tuple[socket.socket, Any]:
        self.accepts += 1
        if self.fail:
            number, self.fail = self.fail[0], self.fail[1:]
            raise OSError(number, os.strerror(number))
        return super().accept()


class Protocol(asyncio.Protocol):
    """Notes its transport."""

    made: list[asyncio.BaseTransport]

    def __init__(self, made: list[asyncio.BaseTransport]) -> None:
        self.made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.made.append(transport)


def run_with(
    number: int,
    test: Callable[[CountingSocket, list[asyncio.BaseTransport]], Coroutine[Any, Any, None]],
    **options: Any,
) -> None:
    """Run `test` with an acceptor on a socket to which `number` clients have connected before its first turn."""

    async def main() -> None:
        made: list[asyncio.BaseTransport] = []
        with CountingSocket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(128)
            clients = [socket.create_connection(listening.getsockname()) for _ in range(number)]
            listening.fail = options.pop("fail", ())
            acceptor = Acceptor(listening, lambda: Protocol(made), **options)
            acceptor.start(128)
            try:
                await test(listening, made)
            finally:
                acceptor.close()
                for transport in made:
                    transport.close()
                for client in clients:
                    client.close()

    uvloop.run(main())


async def until_accepting(listening: CountingSocket) -> None:
    """Up to the end of the first turn of the loop in which the socket is looked at."""
    while not listening.accepts:
        await asyncio.sleep(0)


def test_one_turn_takes_all() -> None:
    async def test(listening: CountingSocket, made: list[asyncio.BaseTransport]) -> None:
        await until_accepting(listening)
        assert listening.accepts == 101  # the last finds nobody
        while len(made) < 100:
            await asyncio.sleep(0)
        taken = made[0].get_extra_info("socket")
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run_with(100, test)


def test_a_turn_is_bounded() -> None:
    async def test(listening: CountingSocket, made: list[asyncio.BaseTransport]) -> None:
        await until_accepting(listening)
        assert listening.accepts == 16
        while len(made) < 40:
            await asyncio.sleep(0)

    run_with(40, test, max_per_turn=16)


def test_a_client_that_left_does_not_hold_up_the_next() -> None:
    async def test(listening: CountingSocket, made: list[asyncio.BaseTransport]) -> None:
        await until_accepting(listening)
        assert listening.accepts == 5
        while len(made) < 3:
            await asyncio.sleep(0)

    run_with(3, test, fail=(errno.ECONNABORTED,))


def test_no_descriptors_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(api.acceptor, "PAUSE_S", 0.2)

    async def test(listening: CountingSocket, made: list[asyncio.BaseTransport]) -> None:
        await until_accepting(listening)
        for _ in range(100):
            await asyncio.sleep(0)
        assert listening.accepts == 1  # it looks away, although the socket stays readable
        while len(made) < 3:
            await asyncio.sleep(0.01)

    with caplog.at_level(logging.WARNING, "quire.api"):
        run_with(3, test, fail=(errno.EMFILE,))
    assert len(caplog.records) == 1
    assert "cannot accept connections" in caplog.text


def test_the_http_server_accepts_when_it_says_so() -> None:
    connected: list[socket.socket] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("no request is sent")

    async def main() -> None:
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))

        def on_listening() -> None:
            connected.append(socket.create_connection(listening.getsockname()))
            server.should_exit = True

        server = HttpServer(app, 1, on_listening)
        await server.run_on(listening)

    uvloop.run(main())
    assert len(connected) == 1
    connected[0].close()
