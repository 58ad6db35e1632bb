"""More requests than the server can do: some are served, all others are told when to come back, and nobody is lost.

Arrivals are open-loop: they do not wait for answers. Outcomes decide; the only figures are ratios with wide margins.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import quire
from tests.e2e.serving import Server
from tests.faults.flood import Flood, at_rate, client, stats, wait_stats

Serve = Callable[..., AbstractContextManager[Server]]


def refused(server: Server) -> int:
    """How many requests the server says that it has refused."""
    return sum(sum(stats(server, part)["refused"].values()) for part in ("engine", "api"))


async def test_ten_times_as_many_as_it_can_do(serve: Serve) -> None:
    """4 rows, 20 steps of 20 ms each: at most 10 requests/s. 100 arrive each second, for six seconds."""
    body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True}
    options = ("--max-num-seqs", "4", "--max-queued-requests", "16", "--api-workers", "2")
    with serve("--device", "null", "--null-step-ms", "20", *options) as server:
        flood = Flood()
        async with client(server) as http:
            rate = await at_rate(100, 600, lambda: flood.post(http, body))
            print(f"{rate:.0f} requests/s arrived: {dict(flood.outcomes)}")
            flood.check()
            assert set(flood.outcomes) == {"finished", "queue_full"}
            assert flood.outcomes["finished"] >= 20  # a house full and a queue full, whatever the machine's speed
            assert flood.outcomes["queue_full"] >= 200
            assert all(1 <= retry_after_s <= 60 for retry_after_s, _ in flood.refusals)
            assert max(retry_after_s for retry_after_s, _ in flood.refusals) >= 2  # 16 wait, 10 a second leave
            bounds = ("--max-queued-requests is 16", "--max-concurrent-requests is 20")
            assert all(any(bound in text for bound in bounds) for _, text in flood.refusals)
            late = Flood()
            await late.post(http, body)
            assert late.outcomes == {"finished": 1}
        wait_stats(server, "engine", lambda found: found["running"] + found["waiting"] == 0)
        wait_stats(server, "engine", lambda _: refused(server) == flood.outcomes["queue_full"])
        assert stats(server, "engine")["kv_blocks_used"] == 0


@pytest.mark.parametrize(
    ("options", "named", "at_least"),
    [
        (("--max-queued-tokens", "1000"), "--max-queued-tokens is 1000", 5),
        (("--max-concurrent-requests", "6", "--api-workers", "2"), "--max-concurrent-requests is 6", 6),
    ],
    ids=["tokens", "concurrent"],
)
async def test_the_bound_that_is_reached_is_named(
    serve: Serve, options: tuple[str, ...], named: str, at_least: int
) -> None:
    """60 prompts of 200 tokens at once, one row."""
    body = {"prompt": [7] * 200, "max_tokens": 20, "ignore_eos": True}
    with serve("--device", "null", "--null-step-ms", "10", "--max-num-seqs", "1", *options) as server:
        flood = Flood()
        async with client(server) as http:
            await asyncio.gather(*(flood.post(http, body) for _ in range(60)))
        print(dict(flood.outcomes))
        flood.check()
        assert set(flood.outcomes) == {"finished", "queue_full"}
        assert flood.outcomes["finished"] >= at_least
        assert {text.split("(")[1].split(")")[0] for _, text in flood.refusals} == {named}


class Tenants:
    """A server with keys, and what became of the requests of each."""

    def __init__(self, server: Server, keys: dict[str, str], folder: Path) -> None:
        self.outcomes: dict[str, Counter[str]] = {name: Counter() for name in keys}
        self.clients = {
            name: quire.AsyncClient(f"ipc://{folder}/door", timeout_s=100, api_key=key) for name, key in keys.items()
        }

    async def ask(self, name: str, tokens: int) -> None:
        sampling = quire.SamplingParams(max_tokens=tokens, ignore_eos=True)
        try:
            await self.clients[name].generate(None, [5, 6, 7], sampling=sampling)
            self.outcomes[name]["finished"] += 1
        except quire.QuireError as error:
            self.outcomes[name][error.code] += 1

    async def close(self) -> None:
        for one in self.clients.values():
            await one.close()


async def tenants_on(serve: Serve, folder: Path, options: tuple[str, ...], play: Any) -> None:
    keys = {"noisy": "n" * 20, "quiet": "q" * 20}
    path = folder / "keys"
    path.write_text("".join(f"{name}: {key}\n" for name, key in keys.items()))
    path.chmod(0o600)
    door = ("--api-key-file", str(path), "--client-address", f"ipc://{folder}/door")
    with serve("--device", "null", "--null-step-ms", "5", *door, *options) as server:
        tenants = Tenants(server, keys, folder)
        try:
            await play(tenants)
        finally:
            await tenants.close()


async def test_ten_thousand_of_one_key_do_not_delay_another(serve: Serve, tmp_path: Path) -> None:
    """8 rows. One key has 10,000 requests waiting; another sends 20, one after the other.

    First come, first served, the first of the 20 would wait for all 10,000. Here each waits for a row, and runs beside
    seven others of its own length: some 16 of the noisy key's end meanwhile. Four times as many are allowed.
    """

    async def play(tenants: Tenants) -> None:
        noisy = [asyncio.create_task(tenants.ask("noisy", 20)) for _ in range(10_000)]
        while tenants.outcomes["noisy"]["finished"] < 50:
            await asyncio.sleep(0.01)
        before = tenants.outcomes["noisy"]["finished"]
        for _ in range(20):
            await tenants.ask("quiet", 20)
        meanwhile = tenants.outcomes["noisy"]["finished"] - before
        for task in noisy:
            task.cancel()
        await asyncio.gather(*noisy, return_exceptions=True)
        print(f"{meanwhile / 20:.1f} of the noisy key's requests ended for each of the quiet one's")
        assert tenants.outcomes["quiet"] == {"finished": 20}
        assert set(tenants.outcomes["noisy"]) == {"finished"}
        assert meanwhile <= 20 * 4 * 16

    await tenants_on(serve, tmp_path, ("--max-num-seqs", "8", "--max-queued-requests", "20000"), play)


async def test_a_full_queue_has_room_for_whoever_has_nothing_in_it(serve: Serve, tmp_path: Path) -> None:
    """A queue of 64 that one key keeps full: another key's requests are taken, and some of the first one's go."""

    async def play(tenants: Tenants) -> None:
        async def press() -> None:
            while True:
                await tenants.ask("noisy", 20)

        pressing = [asyncio.create_task(press()) for _ in range(200)]
        while tenants.outcomes["noisy"]["queue_full"] < 100:
            await asyncio.sleep(0.01)
        for _ in range(20):
            await tenants.ask("quiet", 20)
        for task in pressing:
            task.cancel()
        await asyncio.gather(*pressing, return_exceptions=True)
        print(tenants.outcomes)
        assert tenants.outcomes["quiet"] == {"finished": 20}
        assert set(tenants.outcomes["noisy"]) == {"finished", "queue_full"}

    await tenants_on(serve, tmp_path, ("--max-num-seqs", "8", "--max-queued-requests", "64"), play)
