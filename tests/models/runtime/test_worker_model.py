"""models/runtime/worker.py as processes with tiny-chat on the CPU: one rank, two ranks, and a bad row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from core.config import Config
from core.messages import Batch, BatchResult, NewSequence, RowResult, Scheduled, Shutdown, WorkerFailed, WorkerReady
from quire import SamplingParams, StructuredOutputs
from tests.models.runtime.driving import Driver, Stream

Make = Callable[[Config], Any]
PROMPT = [0, 2, 77, 410, 1033, 5, 600, 9, 12, 3000, 41, 8, 17, 23, 99, 1500, 2000, 7]


class RemoteStep:
    """The answer of the workers behind a harness."""

    due_s = busy_s = 0.0

    def __init__(self, harness: Any) -> None:
        self.harness = harness

    def done(self) -> bool:
        return True

    def results(self) -> list[RowResult]:
        result = self.harness.receive()
        assert isinstance(result, BatchResult), result
        return result.results


class RemoteRunner:
    """A StepRunner whose steps run in the workers behind a harness."""

    depth = 1
    needs_results = False

    def __init__(self, harness: Any) -> None:
        self.harness = harness

    def ready(self, rank: int, engine: str) -> WorkerReady:
        raise NotImplementedError

    def forward(self, batch: Batch) -> None:
        self.harness.send(batch)

    def sample(self) -> RemoteStep:
        return RemoteStep(self.harness)


def outputs(harness: Any) -> list[tuple[list[int], list[float]]]:
    """Four sequences, greedy, drawn and constrained, in chunks and with preemptions."""
    rich = SamplingParams(seed=4, top_p=0.9, frequency_penalty=0.5, logprobs=1, prompt_logprobs=0)
    streams = [
        Stream(PROMPT, SamplingParams(temperature=0.0), 12),
        Stream(PROMPT[::-1], rich, 12, cuts={5}),
        Stream(PROMPT[3:], SamplingParams(temperature=0.0, logprobs=0), 9, joins=2),
        Stream(PROMPT[5:], SamplingParams(seed=1, structured_outputs=StructuredOutputs(json_object=True)), 9, cuts={4}),
    ]
    Driver(RemoteRunner(harness), 4, 8).run(streams, chunk=7)
    return [(s.output, [e.logprob for e in s.logprobs + s.prompt_logprobs]) for s in streams]


def config(ranks: int) -> Config:
    return Config(
        device="cpu", tensor_parallel_size=ranks, max_num_seqs=4, max_model_len=256, num_kv_blocks=40, torch_threads=1
    )


def test_two_ranks_give_the_tokens_of_one(harness: Make) -> None:
    one = harness(config(1))
    (facts,) = one.start()
    assert (facts.num_blocks, facts.block_size, facts.max_num_seqs) == ([40], 16, 4)
    assert facts.weights_bytes > 0
    alone = outputs(one)
    one.send(Shutdown())
    assert one.codes() == [0]
    one.close()

    two = harness(config(2))
    shards = two.start(2)
    assert sorted(shard.rank for shard in shards) == [0, 1]
    assert all(2 * shard.kv_bytes == facts.kv_bytes for shard in shards)
    for (ids, values), (wanted_ids, wanted_values) in zip(outputs(two), alone, strict=True):
        assert ids == wanted_ids
        assert values == pytest.approx(wanted_values, abs=1e-3)
    two.send(Shutdown())
    assert two.codes() == [0, 0]


def test_a_bad_row_is_named_and_the_worker_goes_on_after_a_reset(harness: Make) -> None:
    h = harness(config(1))
    h.start()
    bad = NewSequence(2, 0, [5, 99_999], [], SamplingParams())
    h.send(Batch("", 1, [Scheduled(2, 0, 2, True)], [bad], reset=True))
    h.send(Batch("", 2, [Scheduled(2, 2, 1, True)]))  # was under way when it failed
    failed = h.receive()
    assert isinstance(failed, WorkerFailed)
    assert (failed.step, failed.rows) == (1, [2])
    assert "99999" in failed.message
    assert len(outputs(h)[0][0]) == 12
    h.send(Shutdown())
    assert h.codes() == [0]
