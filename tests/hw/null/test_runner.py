"""hw/null/runner.py: the same Batch protocol as with a model."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.config import Config
from core.messages import Batch, NewSequence, RowResult, Scheduled
from core.model_info import ModelInfo, resolve
from core.text_codec import TextCodec
from hw.null.runner import NullRunner
from quire import SamplingParams, StructuredOutputs

MODEL = ModelInfo("", "m", "r", "llama", [], vocab_size=50, max_model_len=64, eos_ids=[3, 7])


def run(runner: NullRunner, batch: Batch) -> list[RowResult]:
    runner.forward(batch)
    return runner.sample().results()


def decode(sampling: SamplingParams, count: int, known: int = 0, choice: int = 0, mates: int = 0) -> list[int]:
    """`count` tokens of a prompt of 4, of which the first `known` are given as already known outputs."""
    runner = NullRunner(Config(device="null"), MODEL)
    full = decode(sampling, known, 0, choice) if known else []
    others = [NewSequence(row, 0, [9], [], SamplingParams(seed=row)) for row in range(mates)]
    new = NewSequence(mates, choice, [1, 2, 4, 5], full, sampling, [3, 7])
    output = list(full)
    while len(output) < count:
        start = 0 if output == full else 3 + len(output)
        scheduled = [Scheduled(row, len(output), 1, True) for row in range(mates)]
        scheduled.append(Scheduled(mates, start, 4 + len(output) - start, True))
        first = output == full
        results = run(runner, Batch("", 1, scheduled, new=[*others, new] if first else [], reset=first))
        output += results[-1].token_ids
    return output


def test_end_of_sequence_is_never_drawn_and_ids_spread() -> None:
    ids = decode(SamplingParams(seed=5), 60)
    assert not {3, 7} & set(ids)
    assert len(set(ids)) > 25
    assert all(0 <= token < 50 for token in ids)


def test_a_grammar_is_followed_to_its_end() -> None:
    model = resolve("tiny-chat")
    codec = TextCodec(Path(model.path))
    for seed in range(10):
        runner = NullRunner(Config(device="null"), model)
        wanted = SamplingParams(seed=seed, structured_outputs=StructuredOutputs(regex="(ab|c){3}"))
        new, ids = [NewSequence(0, 0, [1, 2], [], wanted, model.eos_ids)], list[int]()
        while not set(ids) & set(model.eos_ids):
            scheduled = Scheduled(0, len(ids) and len(ids) + 1, 1 if ids else 2, True)
            (answer,) = run(runner, Batch("", 1, [scheduled], new=new, reset=bool(new)))
            assert answer.grammar_error == ""
            ids += answer.token_ids
            new = []
        assert re.fullmatch("(ab|c){3}", codec.decode(ids[:-1], False))


def test_depends_on_seed_choice_and_position_only() -> None:
    ids = decode(SamplingParams(seed=5), 20)
    assert decode(SamplingParams(seed=5), 20, known=7) == ids
    assert decode(SamplingParams(seed=5), 20, mates=3) == ids
    assert decode(SamplingParams(seed=6), 20) != ids
    assert decode(SamplingParams(seed=5), 20, choice=1) != ids


def test_bans_forced_ids_and_min_tokens() -> None:
    banned = dict.fromkeys(range(10, 50), -100.0)
    assert set(decode(SamplingParams(seed=1, logit_bias=banned), 30)) <= set(range(10)) - {3, 7}
    forced = SamplingParams(seed=1, logit_bias={7: 100.0}, min_tokens=4)
    ids = decode(forced, 6)
    assert 7 not in ids[:4]
    assert ids[4:] == [7, 7]


def test_log_probabilities_are_those_of_the_uniform_distribution() -> None:
    runner = NullRunner(Config(device="null"), MODEL)
    new = NewSequence(0, 0, [1, 2, 4, 5], [], SamplingParams(seed=1, logprobs=2, prompt_logprobs=0))
    first = run(runner, Batch("", 1, [Scheduled(0, 0, 2, False, True)], new=[new], reset=True))
    second = run(runner, Batch("", 2, [Scheduled(0, 2, 2, True, True)]))
    assert [len(first[0].prompt_logprobs), len(second[0].prompt_logprobs)] == [2, 1]
    assert first[0].token_ids == []
    assert second[0].logprobs[0].logprob == pytest.approx(-math.log(48))
    assert len(second[0].logprobs[0].top_ids) == 2


def test_steps_queue_up_and_take_their_time() -> None:
    runner = NullRunner(Config(device="null", null_step_ms=20), MODEL)
    new = NewSequence(0, 0, [1], [], SamplingParams(seed=1))
    begin_s = time.monotonic()
    runner.forward(Batch("", 1, [Scheduled(0, 0, 1, True)], new=[new], reset=True))
    first = runner.sample()
    runner.forward(Batch("", 2, [Scheduled(0, 1, 1, True)]))
    second = runner.sample()
    assert first.due_s - begin_s >= 0.02
    assert second.due_s - first.due_s == pytest.approx(0.02)
    first.results()
    assert time.monotonic() >= first.due_s


def test_needs_no_torch() -> None:
    code = "import sys, models.runtime.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
