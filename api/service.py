"""Service: what every endpoint, of either door, needs; made once per api process."""

from __future__ import annotations

import json
from typing import Any, Protocol

import msgspec

from api.engine_client import EngineClient
from api.served import ServedModel
from core.errors import QuireError
from core.messages import StatsReply


class Figures(Protocol):
    """Where the server's state and everybody's statistics come from (the supervisor)."""

    @property
    def state(self) -> str:
        """The server's state as last heard: "loading", "ready", "draining", "failed"."""
        ...

    @property
    def progressing(self) -> bool:
        """Whether the engine's loop turns, and steps end while there is work."""
        ...

    async def query(self) -> StatsReply:
        """The latest snapshots of all processes. Raises QuireError when the supervisor does not answer."""
        ...


class Service(msgspec.Struct, frozen=True):
    """The engine, the model, the figures, and the limits of the doors."""

    engine: EngineClient
    model: ServedModel
    figures: Figures
    version: str
    max_body_bytes: int
    strict_fields: bool = False
    keep_alive_s: float = 15.0

    def count_error(self, code: str) -> None:
        """Note an error that a client was told."""
        errors = self.engine.counts.errors
        errors[code] = errors.get(code, 0) + 1

    async def check_ready(self) -> None:
        """Refuse work while the engine starts, or comes back after a death. Raises QuireError("loading")."""
        if self.figures.state == "ready":
            return
        state = (await self.figures.query()).state
        if state == "failed":
            raise QuireError("engine_failed", "a process of the engine kept dying; the server has given up")
        if state == "loading":
            raise QuireError("loading", "the model is being loaded; try again soon", None, 1.0)


def to_json(value: Any) -> bytes:
    """Figures as indented JSON, for people who look with curl."""
    return json.dumps(value, indent=2).encode() + b"\n"
