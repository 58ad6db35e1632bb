"""SupervisorFigures: the line from an api process to the supervisor, on the event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import zmq

from core.errors import QuireError
from core.messages import StatsQuery, StatsReply
from core.process import Process
from core.stats import EngineSnapshot, decode

FRESH_S = 0.2  # a reply this young answers the next query too
ANSWER_S = 3.0
TICK_S = 1.0
STUCK_S = 60.0  # a step on a slow device with a large model may take this long; nothing healthy takes longer


class SupervisorFigures:
    """Heartbeats out; statistics and the Shutdown in.

    Args:
        process: this process.
        snapshot: makes what the heartbeat carries.
        on_reply: called with every reply.
        on_shutdown: called once, when the supervisor asks for the end or is gone.
    """

    def __init__(
        self,
        process: Process,
        snapshot: Callable[[], Any],
        on_shutdown: Callable[[], None],
        on_reply: Callable[[StatsReply], None] = lambda _: None,
    ) -> None:
        self.state = "loading"
        self.progressing = True
        self._process = process
        self._snapshot = snapshot
        self._on_shutdown = on_shutdown
        self._on_reply = on_reply
        self._numbers = itertools.count(1)
        self._reply: StatsReply | None = None
        self._reply_s = 0.0
        self._waiting: list[asyncio.Future[StatsReply]] = []
        self._steps = -1
        self._progress_s = time.monotonic()
        self._told = False

    async def run(self) -> None:
        """Beat and listen until cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.control.socket.getsockopt(zmq.FD), self._read)
        try:
            while True:
                if self._process.control.due():
                    self._process.beat(self._snapshot())
                self._process.control.send(StatsQuery(next(self._numbers)))
                self._read()
                await asyncio.sleep(TICK_S)
        finally:
            loop.remove_reader(self._process.control.socket.getsockopt(zmq.FD))

    async def query(self) -> StatsReply:
        """The latest snapshots. Raises QuireError("engine_failed") when the supervisor does not answer."""
        # While the server starts every query asks anew: nobody is told "loading" after it has said "ready".
        if self._reply is not None and self.state == "ready" and time.monotonic() - self._reply_s < FRESH_S:
            return self._reply
        future: asyncio.Future[StatsReply] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._process.control.send(StatsQuery(next(self._numbers)))
        self._read()
        try:
            return await asyncio.wait_for(future, ANSWER_S)
        except TimeoutError:
            raise QuireError("engine_failed", "the supervisor does not answer") from None

    def _read(self) -> None:
        for message in self._process.poll_control():
            if isinstance(message, StatsReply):
                self._take(message)
        if self._process.stopping and not self._told:
            self._told = True
            self._on_shutdown()

    def _take(self, reply: StatsReply) -> None:
        self._reply, self._reply_s = reply, time.monotonic()
        self.state = reply.state
        self._note_progress(reply)
        self._on_reply(reply)
        for future in self._waiting:
            if not future.done():
                future.set_result(reply)
        self._waiting.clear()

    def _note_progress(self, reply: StatsReply) -> None:
        for payload in reply.snapshots.values():
            snapshot = decode(payload)
            if isinstance(snapshot, EngineSnapshot):
                idle = not snapshot.running and not snapshot.waiting
                if idle or snapshot.steps != self._steps:
                    self._steps = snapshot.steps
                    self._progress_s = time.monotonic()
        self.progressing = time.monotonic() - self._progress_s < STUCK_S
