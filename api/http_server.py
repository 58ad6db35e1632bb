"""HttpServer: uvicorn, set up for an app whose answers are mostly long streams."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE_S = 75  # longer than the idle time of common proxies and clients, so that they end the connection, not we


class HttpServer(uvicorn.Server):
    """Serves `app` on a listening socket that exists already.

    Args:
        drain_s: at the end, seconds in which running answers may finish.
    """

    def __init__(self, app: ASGIApp, drain_s: float) -> None:
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

    async def run_on(self, listening: socket.socket) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[listening])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the supervisor ends this process by a message."""
        yield
