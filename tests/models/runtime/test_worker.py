"""models/runtime/worker.py as a process, over real sockets, on the null device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from core.config import Config
from core.messages import Batch, BatchResult, Heartbeat, NewSequence, RowBlocks, Scheduled, Shutdown, WorkerFailed
from quire import SamplingParams

Make = Callable[[Config], Any]


def first(engine: str, sampling: SamplingParams, step: int = 1, prompt: list[int] | None = None) -> Batch:
    """A sequence begins in row 0, after a reset."""
    prompt = prompt or [0, 5, 9]
    new = NewSequence(0, 0, prompt, [], sampling, [1, 3])
    scheduled = [Scheduled(0, 0, len(prompt), True)]
    return Batch(engine, step, scheduled, [new], blocks=[RowBlocks(0, 0, 0, [1])], sent_s=time.monotonic(), reset=True)


def following(engine: str, step: int, start: int) -> Batch:
    return Batch(engine, step, [Scheduled(0, start, 1, True)], sent_s=time.monotonic())


def test_next_batch_is_received_before_a_result_is_sent(harness: Make) -> None:
    """Also when the sequence ends in that step: its end-of-sequence is not awaited."""
    h = harness(Config(device="null", null_step_ms=100))
    h.start()
    end_in_second = SamplingParams(seed=1, logit_bias={3: 100.0}, min_tokens=1)
    h.send(first(h.engine, end_in_second))
    h.send(following(h.engine, 2, 3))
    results: list[BatchResult] = []
    for step in range(3, 9):
        result = h.receive()
        assert isinstance(result, BatchResult)
        results.append(result)
        h.send(following(h.engine, step, step + 1))
    assert [result.step for result in results] == [1, 2, 3, 4, 5, 6]
    assert results[0].results[0].token_ids != [3]
    assert results[1].results[0].token_ids == [3]
    for one, next_one in itertools.pairwise(results):
        assert next_one.received_s < one.done_s
        assert one.busy_s == pytest.approx(0.1)


def test_several_batches_queue_and_are_answered_in_order(harness: Make) -> None:
    h = harness(Config(device="null", null_step_ms=1))
    h.start()
    h.send(first(h.engine, SamplingParams(seed=1)), *[following(h.engine, step, step + 1) for step in range(2, 12)])
    assert [h.receive().step for _ in range(11)] == list(range(1, 12))


def test_a_fresh_worker_ignores_what_came_before_its_first_reset(harness: Make) -> None:
    h = harness(Config(device="null"))
    h.start()
    h.send(following(h.engine, 41, 3))
    h.send(first(h.engine, SamplingParams(seed=1), step=42))
    assert h.receive().step == 42


def test_reports_ready_beats_and_ends_at_shutdown(harness: Make) -> None:
    h = harness(Config(device="null", num_kv_blocks=77))
    (facts,) = h.start()
    assert (facts.rank, facts.engine, facts.num_blocks, facts.device) == (0, h.engine, [77], "null")
    assert "KV cache" in h.ready().detail
    frame = h.control.receive(5.0)
    assert frame is not None
    assert isinstance(frame[1][0], Heartbeat)
    h.send(Shutdown("test"))
    assert h.codes() == [0]


def test_is_small_and_without_torch(harness: Make) -> None:
    h = harness(Config(device="null"))
    h.start()
    maps = {mapping.path for mapping in psutil.Process(h.processes[0].pid).memory_maps()}
    assert not any("torch" in path for path in maps)


def test_an_unexpected_error_ends_the_process_and_is_told(harness: Make) -> None:
    h = harness(Config(device="null"))
    h.start()
    h.send(Batch(h.engine, 1, [Scheduled(9, 0, 1, True)], reset=True))  # row 9 was never begun
    failed = h.receive()
    assert isinstance(failed, WorkerFailed)
    assert (failed.step, failed.rank) == (1, 0)
    assert "KeyError" in failed.message
    assert h.codes() == [1]
