"""Flood: requests that come at a rate of their own, whatever the server says, and what became of each."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.serving import Server


@dataclass
class Flood:
    """Outcomes by name: "finished", or the code of the error. `refusals`: (Retry-After, message) of each 429."""

    sent: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    refusals: list[tuple[int, str]] = field(default_factory=list)

    async def post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        """One completion over HTTP."""
        self.sent += 1
        try:
            answer = await client.post("/v1/completions", json=body)
        except httpx.HTTPError as failure:
            self.outcomes[type(failure).__name__] += 1
            return
        if answer.status_code == 200:
            self.outcomes["finished"] += 1
            return
        error = answer.json()["error"]
        self.outcomes[error["code"]] += 1
        if answer.status_code == 429:
            self.refusals.append((int(answer.headers["retry-after"]), error["message"]))

    def check(self) -> None:
        """Every request has ended, once."""
        assert sum(self.outcomes.values()) == self.sent, self.outcomes


def client(server: Server) -> httpx.AsyncClient:
    """A client with as many connections as it needs."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=90)


async def at_rate(per_s: float, count: int, one: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """Begin `count` calls at a steady rate without waiting for any; returns the rate that was reached."""
    began = time.monotonic()
    tasks = []
    for index in range(count):
        await asyncio.sleep(max(0.0, began + index / per_s - time.monotonic()))
        tasks.append(asyncio.create_task(one()))
    reached = count / (time.monotonic() - began)
    await asyncio.gather(*tasks)
    return reached


def stats(server: Server, part: str) -> dict[str, Any]:
    """A part of GET /stats: "engine", "api", "tokenizer"."""
    with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)[part]
    return found


def wait_stats(server: Server, part: str, done: Callable[[dict[str, Any]], bool], within_s: float = 8.0) -> None:
    """Until the figures are as they must be; statistics come once a second."""
    deadline = time.monotonic() + within_s
    while not done(found := stats(server, part)):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
