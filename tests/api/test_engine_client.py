"""EngineClient and Journal over a real socket, with a tokenizer that says exactly what the test wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from api.engine_client import ClientGone, EngineClient
from api.journal import Journal
from core.admission import Bounds
from core.channel import Client, Server
from core.errors import QuireError
from core.messages import (
    Abort,
    ChoiceProgress,
    Delta,
    Failed,
    Finished,
    FromTokenizer,
    Generate,
    QueueState,
    Rejected,
    Started,
    TextPrompt,
    ToTokenizer,
)
from quire import SamplingParams

HELLO = TextPrompt("hello")


class Bench:
    """Two tokenizers' ends of the sockets, and the client between them and the test."""

    def __init__(self, folder: Path, **options: Any) -> None:
        context: zmq.Context[Any] = zmq.Context.instance()
        addresses = [f"ipc://{folder}/tokenizer-{index}" for index in range(2)]
        self.servers: list[Server[Any]] = [Server(context, address, ToTokenizer) for address in addresses]
        self.links: list[Client[Any]] = [Client(context, a, FromTokenizer, name="api-0") for a in addresses]
        self.client = EngineClient(self.links, "m@1", "p.", max_live=8, max_buffered=10, **options)
        self.client.start()

    async def next(self, index: int = 0) -> Any:
        """The next message that a tokenizer got."""
        for _ in range(500):
            frame = self.servers[index].receive(0)
            if frame is not None:
                assert frame[0] == "api-0"
                (message,) = frame[1]
                return message
            await asyncio.sleep(0.002)
        raise AssertionError("nothing came")

    def say(self, *messages: Any, index: int = 0) -> None:
        self.servers[index].send("api-0", list(messages))

    def close(self) -> None:
        self.client.stop()
        for link in self.links:
            link.close()
        for server in self.servers:
            server.close()


@pytest.fixture
async def bench(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(folder)
    yield bench
    bench.close()


def delta(request_id: str, first: int, *ids: int, **more: Any) -> Delta:
    return Delta(request_id, more.pop("choice", 0), first, "x" * len(ids), list(ids), **more)


async def test_one_frame_is_one_turn(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams(n=2)) as stream:
        request = await bench.next()
        assert isinstance(request, Generate)
        assert (request.request_id, request.engine, request.prompt) == ("p.1", "m@1", HELLO)
        assert request.sampling.seed is not None
        frame = [Started("p.1", 3), delta("p.1", 0, 5), delta("p.1", 0, 6, choice=1)]
        bench.say(*frame)
        assert await anext(stream) == [(0, event) for event in frame]
        ends = [delta("p.1", 1, 7, finish_reason="stop"), delta("p.1", 1, 8, choice=1, finish_reason="length")]
        bench.say(*ends, Finished("p.1", 3, 4))
        assert [event for _, event in await anext(stream)] == [*ends, Finished("p.1", 3, 4)]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert bench.client.live == {}
    assert bench.client.num_live == 0
    assert bench.servers[0].receive(0.05) is None  # no abort after an ending
    counts = bench.client.snapshot()
    assert (counts.requests, counts.finished, counts.aborted) == (1, 1, 0)
    assert (counts.ttft.count, counts.inter_token.count, counts.end_to_end.count) == (2, 2, 1)


async def test_requests_spread_and_keep_their_seed(bench: Bench) -> None:
    async with bench.client.generate([HELLO, HELLO, HELLO], SamplingParams(seed=4)) as stream:
        requests = [await bench.next(0), await bench.next(1), await bench.next(0)]
        assert [r.request_id for r in requests] == ["p.1", "p.2", "p.3"]
        assert {r.sampling.seed for r in requests} == {4}
        bench.say(Finished("p.2", 1, 1), index=1)
        assert await anext(stream) == [(1, Finished("p.2", 1, 1))]
    assert {(await bench.next(0)).request_id, (await bench.next(0)).request_id} == {"p.1", "p.3"}
    assert bench.servers[1].receive(0.05) is None


async def test_leaving_aborts_at_once(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams()) as stream:
        await bench.next()
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        stream.close()
        with pytest.raises(ClientGone):
            await waiting
    assert await bench.next() == Abort("p.1")
    bench.say(delta("p.1", 0, 5))  # still under way: dropped, and not aborted again
    await asyncio.sleep(0.05)
    assert bench.servers[0].receive(0) is None


@pytest.mark.parametrize(
    ("ending", "code", "retry_after_s"),
    [
        (Rejected("p.1", "queue_full", "full", None, 2.0), "queue_full", 2.0),
        (Failed("p.1", "worker_failed", "x"), "worker_failed", None),
    ],
)
async def test_an_error_ends_all(bench: Bench, ending: Any, code: str, retry_after_s: float | None) -> None:
    async with bench.client.generate([HELLO, HELLO], SamplingParams()) as stream:
        await bench.next(0)
        await bench.next(1)
        bench.say(delta("p.1", 0, 5), ending)
        assert await anext(stream) == [(0, delta("p.1", 0, 5))]  # what came before can still be read
        with pytest.raises(QuireError) as caught:
            await anext(stream)
    assert (caught.value.code, caught.value.retry_after_s) == (code, retry_after_s)
    assert await bench.next(1) == Abort("p.2")
    assert bench.servers[0].receive(0.05) is None


async def test_a_consumer_that_does_not_read(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams()) as stream:
        await bench.next()
        bench.say(*(delta("p.1", index, index) for index in range(50)))
        assert await bench.next() == Abort("p.1")
        assert len(await anext(stream)) == 11
        with pytest.raises(QuireError) as caught:
            await anext(stream)
    assert caught.value.code == "client_too_slow"


async def test_limits(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams(n=8)):
        with pytest.raises(QuireError) as caught:
            bench.client.generate([HELLO], SamplingParams())
        assert (caught.value.code, caught.value.retry_after_s) == ("queue_full", 1.0)
    bench.client.draining = True
    with pytest.raises(QuireError) as caught:
        bench.client.generate([HELLO], SamplingParams())
    assert caught.value.code == "draining"


@pytest.fixture
async def bounded(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(folder, bounds=Bounds(max_queued_requests=4, max_queued_tokens=1000, max_concurrent_requests=5))
    yield bench
    bench.close()


async def told(bench: Bench, state: QueueState) -> None:
    """Let the client hear how full the house is."""
    bench.say(state)
    await asyncio.sleep(0.05)


async def test_a_full_house_refuses_early_whoever_has_a_share_of_it(bounded: Bench) -> None:
    client, bench = bounded.client, bounded
    noisy = [client.generate([HELLO], SamplingParams(), tenant="noisy") for _ in range(3)]
    await bench.next(0)
    await told(bench, QueueState(4, 50, 4, 7))
    with pytest.raises(QuireError, match="--max-queued-requests is 4") as caught:
        client.generate([HELLO], SamplingParams(), tenant="noisy")
    assert (caught.value.code, caught.value.retry_after_s) == ("queue_full", 7)
    assert client.snapshot().refused == {"max_queued_requests": 1}
    quiet = client.generate([HELLO], SamplingParams(), tenant="quiet")  # the scheduler decides who gives way
    await told(bench, QueueState(0, 0, 0))
    noisy.append(client.generate([HELLO], SamplingParams(), tenant="noisy"))
    for stream in (*noisy, quiet):
        stream.close()


async def test_the_bound_on_all_requests_is_known_here(bounded: Bench) -> None:
    streams = [bounded.client.generate([HELLO], SamplingParams()) for _ in range(5)]
    with pytest.raises(QuireError, match="--max-concurrent-requests is 5"):
        bounded.client.generate([HELLO], SamplingParams())
    for stream in streams:
        stream.close()
    bounded.client.generate([HELLO], SamplingParams()).close()


async def test_a_deadline_that_has_passed_is_not_sent(bench: Bench) -> None:
    with pytest.raises(QuireError) as caught:
        bench.client.generate([HELLO], SamplingParams(), deadline_s=time.monotonic() - 1)
    assert caught.value.code == "deadline_exceeded"
    await asyncio.sleep(0.02)
    assert bench.servers[0].receive(0) is None


async def test_a_deadline_is_kept_when_nobody_below_keeps_it(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams(), deadline_s=time.monotonic() + 0.05) as stream:
        await bench.next()
        with pytest.raises(QuireError) as caught:
            await anext(stream)
        assert caught.value.code == "deadline_exceeded"
    assert await bench.next() == Abort("p.1")
    assert bench.client.snapshot().expired == 1


async def test_requests_of_a_former_life_are_aborted(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams()):
        await bench.next()
        bench.say(delta("old.7", 0, 5))
        assert await bench.next() == Abort("old.7")


async def test_a_gap_is_an_error(bench: Bench) -> None:
    async with bench.client.generate([HELLO], SamplingParams()) as stream:
        await bench.next()
        bench.say(delta("p.1", 1, 5))
        with pytest.raises(QuireError) as caught:
            await anext(stream)
        assert caught.value.code == "internal_error"
        assert await bench.next() == Abort("p.1")


def journal(n: int = 1) -> Journal:
    return Journal(Generate("r", "m@1", HELLO, SamplingParams(n=n, seed=1)))


def test_journal_drops_what_came_before() -> None:
    kept = journal()
    assert kept.record(delta("r", 0, 1, 2)) == delta("r", 0, 1, 2)
    assert kept.record(delta("r", 0, 1, 2)) is None
    assert kept.record(delta("r", 1, 2)) is None
    fresh = kept.record(delta("r", 1, 2, 3, 4))
    assert fresh is not None
    assert (fresh.first, fresh.token_ids) == (2, [3, 4])
    with pytest.raises(ValueError, match="tokens 4 to 9 of choice 0"):
        kept.record(delta("r", 9, 5))
    assert kept.choices[0].output_ids == [1, 2, 3, 4]


def test_journal_resumes_what_is_unfinished_and_drops_the_old_epoch() -> None:
    kept = journal(2)
    kept.record(delta("r", 0, 1, 2))
    kept.record(delta("r", 0, 8, choice=1, finish_reason="stop"))
    again = kept.resume()
    assert again.epoch == 1
    assert again.resume == [ChoiceProgress(0, [1, 2])]
    assert kept.complete(Finished("r", 5, 4)) == Finished("r", 5, 5)  # the finished choice's token counts too
    assert again.sampling.seed == 1
    assert kept.record(delta("r", 2, 3)) is None  # from before the restart
    assert kept.record(delta("r", 2, 3, epoch=1)) is not None
    assert kept.record(delta("r", 1, 9, choice=1, epoch=1)) is None  # that choice had ended
    assert kept.resume().resume[0] == ChoiceProgress(0, [1, 2, 3])
