"""Acceptor: takes every waiting connection of a listening socket in one turn of the event loop.

libuv hands over one connection per turn; when hundreds of clients connect at once and each turn also does their work,
the last of them would wait for seconds.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable

log = logging.getLogger("quire.api")

MAX_PER_TURN = 256  # so that a flood of connections cannot keep the running streams from their turn
PAUSE_S = 0.5
HANDSHAKE_S = 15.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Connects each client of `listening` to a protocol made by `protocol`.

    Args:
        listening: a bound socket, made non-blocking here. Other processes may accept from it too.
        max_per_turn: connections taken before the event loop gets its turn back.
        tls: makes every connection a TLS one.
    """

    def __init__(
        self,
        listening: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        max_per_turn: int = MAX_PER_TURN,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._listening = listening
        self._tls = tls
        self._protocol = protocol
        self._max_per_turn = max_per_turn
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    def start(self, backlog: int) -> None:
        """Listen and accept from now on."""
        self._listening.setblocking(False)
        self._listening.listen(backlog)
        self._loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Accept no more; the socket stays open, and connections that were taken live on."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listening)

    def _accept(self) -> None:
        for _ in range(self._max_per_turn):
            try:
                connection, _address = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._rest(error)
                    return
                continue  # this client went away while it waited (ECONNABORTED and its kin); the next may be well
            task = self._loop.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self._protocol,
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_S,
            )
        except OSError as error:
            connection.close()
            log.debug("a client went away while it was connected: %s", error)

    def _rest(self, error: OSError) -> None:
        """The client that cannot be taken stays in the queue, so the socket stays readable: look away for a while."""
        log.warning("cannot accept connections: %s; trying again in %.1f s", error.strerror, PAUSE_S)
        self._loop.remove_reader(self._listening)
        self._pause = self._loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening, self._accept)
