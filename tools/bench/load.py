"""Load: what a benchmark sends, and the processes that send it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import uvloop

from tools.bench.client import Answer, StreamClient


@dataclass(frozen=True)
class Load:
    """One measurement. Prompts are random token ids of exact length, so that nothing is in a prefix cache by chance.

    concurrency: requests in flight (closed loop). rate: arrivals per second (Poisson) instead, when not None.
    shared_prefix: leading tokens that all prompts have in common. turns: each conversation sends its history again.
    """

    url: str
    model: str
    num_requests: int
    concurrency: int
    prompt_tokens: int = 512
    output_tokens: int = 256
    output_spread: float = 0.0  # output lengths are uniform in output_tokens * (1 ± spread)
    vocab_size: int = 4096
    rate: float | None = None
    shared_prefix: int = 0
    turns: int = 1
    temperature: float = 0.0
    seed: int = 0
    key: str | None = None
    clients: int = 1

    def prompt(self, index: int) -> list[int]:
        """Token ids of request `index`. Turn t of a conversation begins with all of turn t - 1."""
        conversation, turn = divmod(index, self.turns)
        shared = random.Random(self.seed).choices(range(5, self.vocab_size), k=self.shared_prefix)
        own = random.Random(f"{self.seed} {conversation}")
        length = max(1, self.prompt_tokens - self.shared_prefix)
        return shared + own.choices(range(5, self.vocab_size), k=length + turn * length)

    def body(self, index: int) -> bytes:
        """The JSON of request `index`."""
        spread = random.Random(f"{self.seed} length {index}").uniform(-self.output_spread, self.output_spread)
        return json.dumps(
            {
                "model": self.model,
                "prompt": self.prompt(index),
                "max_tokens": max(1, round(self.output_tokens * (1 + spread))),
                "temperature": self.temperature,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()


async def send(load: Load, client: int) -> list[Answer]:
    """This client's share of a load: requests client, client + clients, …"""
    indices = iter(range(client, load.num_requests, load.clients))
    answers: list[Answer] = []
    bodies = {index: load.body(index) for index in range(client, load.num_requests, load.clients)}

    async def stay_in_flight() -> None:
        connection = StreamClient(load.url)
        for index in indices:
            answers.append(await connection.ask(index, "/v1/completions", bodies.pop(index), load.key))
        connection.abandon()

    async def arrive(index: int) -> None:
        connection = StreamClient(load.url)
        answers.append(await connection.ask(index, "/v1/completions", bodies.pop(index), load.key))
        connection.abandon()

    if load.rate is None:
        share = load.concurrency // load.clients + (client < load.concurrency % load.clients)
        await asyncio.gather(*(stay_in_flight() for _ in range(share)))
        return answers
    arrivals = random.Random(f"{load.seed} arrivals {client}")
    tasks = []
    for index in indices:
        await asyncio.sleep(arrivals.expovariate(load.rate / load.clients))
        tasks.append(asyncio.create_task(arrive(index)))
    await asyncio.gather(*tasks)
    return answers


def _client(load: Load, client: int) -> list[Answer]:
    answers: list[Answer] = uvloop.run(send(load, client))
    return answers


def run(load: Load) -> tuple[list[Answer], float, float]:
    """Send a load from its client processes; returns the answers and when it began and ended."""
    began = time.monotonic()
    if load.clients == 1:
        answers = _client(load, 0)
    else:
        with concurrent.futures.ProcessPoolExecutor(load.clients) as pool:
            parts = list(pool.map(_client, [load] * load.clients, range(load.clients)))
        answers = [answer for part in parts for answer in part]
    return answers, began, time.monotonic()


def as_row(load: Load, report: dict[str, Any]) -> list[str]:
    """The cells of a Markdown table row; see HEADER."""

    def milliseconds(key: str, share: str) -> str:
        value = report[key][share]
        return "-" if value is None else f"{value * 1000:,.1f}"

    arrival = f"{load.rate:g}/s" if load.rate is not None else f"{load.concurrency}"
    return [
        arrival,
        f"{report['output_tokens_per_s']:,.0f}",
        f"{report['requests_per_s']:,.2f}",
        f"{milliseconds('ttft_s', 'p50')} / {milliseconds('ttft_s', 'p99')}",
        f"{milliseconds('tpot_s', 'p50')} / {milliseconds('tpot_s', 'p99')}",
        f"{milliseconds('inter_token_s', 'p50')} / {milliseconds('inter_token_s', 'p99')}",
        f"{report['end_to_end_s']['p99']:,.2f}" if report["end_to_end_s"]["p99"] is not None else "-",
        f"{report['num_ok']}",
        ", ".join(f"{code} {count}" for code, count in report["errors"].items()) or "0",
    ]


HEADER = [
    "C",
    "tokens/s",
    "requests/s",
    "TTFT p50 / p99 ms",
    "TPOT p50 / p99 ms",
    "inter-token p50 / p99 ms",
    "end-to-end p99 s",
    "N",
    "errors",
]
