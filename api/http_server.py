"""HttpServer: uvicorn, set up for an app whose answers are mostly long streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from api.acceptor import MAX_PER_TURN, Acceptor
from api.http_protocol import HttpProtocol

KEEP_ALIVE_S = 75  # longer than the idle time of common proxies and clients, so that they end the connection, not we


class HttpServer(uvicorn.Server):
    """Serves `app` on a listening socket that exists already.

    Args:
        drain_s: at the end, seconds in which running answers may finish.
        on_listening: called once, when clients can connect.
        processes: how many accept from the same socket; each then takes a smaller share per turn.
        tls: for HTTPS.
    """

    def __init__(
        self,
        app: ASGIApp,
        drain_s: float,
        on_listening: Callable[[], None] = lambda: None,
        processes: int = 1,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                loop="none",
                ws="none",
                proxy_headers=False,
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, int(drain_s)),
            )
        )
        self._on_listening = on_listening
        self._max_per_turn = max(8, MAX_PER_TURN // processes)
        self._tls = tls
        self._acceptors: list[Acceptor] = []

    async def run_on(self, listening: socket.socket) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """In place of uvicorn's, whose listener takes one connection per turn of the loop."""
        self.servers = []  # uvicorn's own listeners, which its shutdown closes
        for listening in sockets or []:
            acceptor = Acceptor(listening, self._protocol, self._max_per_turn, self._tls)
            acceptor.start(self.config.backlog)
            self._acceptors.append(acceptor)
        self.started = True
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, then as uvicorn."""
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        return HttpProtocol(self.config, self.server_state, {})

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the supervisor ends this process by a message."""
        yield
