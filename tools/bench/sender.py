"""Sender: the client processes that send a load, each on an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import uvloop

from tools.bench.client import Answer, StreamClient
from tools.bench.load import Load

_START_S = 300.0  # a large tokenizer, many prompts, slow cores


@dataclass
class Sent:
    """What a load's clients saw, over [began_s, ended_s] of time.monotonic().

    client_shares: CPU share of each client process. Near 1.0 the generator, not the server, is what was measured.
    """

    answers: list[Answer]
    began_s: float
    ended_s: float
    client_shares: list[float]


def send(load: Load) -> Sent:
    """Send a load from its client processes; they begin together when all their prompts are made."""
    if load.clients == 1:
        return _client(load, 0)
    # spawn: the parent may hold threads (tokenizers, torch), which a fork would cut off in the middle of a lock.
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(load.clients)
    with ProcessPoolExecutor(load.clients, context, _share_barrier, (barrier,)) as pool:
        parts = list(pool.map(_client, [load] * load.clients, range(load.clients)))
    return Sent(
        [answer for part in parts for answer in part.answers],
        min(part.began_s for part in parts),
        max(part.ended_s for part in parts),
        [share for part in parts for share in part.client_shares],
    )


_barrier: Barrier | None = None  # of this client process; a pool's worker can get it in no other way


def _share_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _client(load: Load, client: int) -> Sent:
    # One turn: all bodies are made before the first is sent. Later turns need the answers before them.
    numbers = range(client, load.conversations, load.clients)
    bodies = {number * load.turns: load.body(number * load.turns) for number in numbers}
    if _barrier is not None:
        _barrier.wait(_START_S)
    began, busy = time.monotonic(), time.process_time()
    answers: list[Answer] = uvloop.run(_send(load, client, list(numbers), bodies))
    ended = time.monotonic()
    return Sent(answers, began, ended, [(time.process_time() - busy) / max(1e-9, ended - began)])


async def _send(load: Load, client: int, numbers: list[int], bodies: dict[int, bytes]) -> list[Answer]:
    """This client's share of the conversations: client, client + clients, …"""
    answers: list[Answer] = []
    idle: list[StreamClient] = []

    def connection() -> StreamClient:
        return idle.pop() if idle else StreamClient(load.url, load.key, load.timeout_s, keep_text=load.turns > 1)

    async def converse(number: int) -> None:
        line = connection()
        await _converse(load, line, number, bodies, answers.append)
        idle.append(line)

    try:
        if load.rate is None:
            share = load.concurrency // load.clients + (client < load.concurrency % load.clients)
            waiting = iter(numbers)

            async def stay_in_flight() -> None:
                for number in waiting:
                    await converse(number)

            await asyncio.gather(*(stay_in_flight() for _ in range(share)))
        else:
            await _arrive(load, client, numbers, converse)
    finally:
        for line in idle:
            line.abandon()
    return answers


async def _arrive(load: Load, client: int, numbers: list[int], converse: Callable[[int], Awaitable[None]]) -> None:
    """Begin conversations at Poisson times, whether or not earlier ones have ended."""
    assert load.rate is not None
    arrivals = random.Random(f"{load.seed} arrivals {client}")
    at = asyncio.get_running_loop().time()
    tasks = []
    for number in numbers:
        at += arrivals.expovariate(load.rate / load.turns / load.clients)
        # Against the clock, not from the last arrival on: else each late wake-up would lower the rate.
        await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
        tasks.append(asyncio.ensure_future(converse(number)))
    await asyncio.gather(*tasks)


async def _converse(
    load: Load, line: StreamClient, number: int, bodies: dict[int, bytes], done: Callable[[Answer], None]
) -> None:
    """All turns of a conversation, one after the other; a failed turn ends it."""
    history: list[dict[str, str]] = []
    for index in range(number * load.turns, (number + 1) * load.turns):
        body = bodies.pop(index, None) or load.body(index, history)
        answer = await line.ask(index, load.path, body)
        done(answer)
        if answer.error:
            return
        if load.turns > 1:
            history.append(json.loads(body)["messages"][-1])
            history.append({"role": "assistant", "content": answer.text})
