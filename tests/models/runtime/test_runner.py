"""models/runtime/runner.py with tiny-chat on the CPU, against transformers and against itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.config import Config
from core.messages import Batch, BlockCopy, NewSequence, RowBlocks, Scheduled
from core.model_info import resolve
from hw.comm import Comm
from hw.select import select
from models.runtime.build import load_runner
from models.runtime.runner import ModelRunner
from models.runtime.step import BadRow
from quire import SamplingParams
from tests.models.runtime.driving import Driver, Stream

FOLDER = Path(__file__).resolve().parents[3] / "models" / "builtin" / "tiny-chat"
ROWS, LEN, BLOCK = 8, 512, 16
GREEDY = SamplingParams(temperature=0.0)
RICH = SamplingParams(
    temperature=0.9, top_k=50, top_p=0.95, presence_penalty=0.6, frequency_penalty=0.3, repetition_penalty=1.2,
    seed=11, min_tokens=9, logprobs=3, logit_bias={20: 2.0},
)  # fmt: skip


@cache
def runner() -> ModelRunner:
    torch.set_num_threads(1)
    config = Config(max_num_seqs=ROWS, num_kv_blocks=ROWS * LEN // BLOCK, block_size=BLOCK)
    return load_runner(config, resolve("tiny-chat", max_model_len=LEN), select("cpu"), Comm())


def drive(*streams: Stream, chunk: int = 1 << 30) -> list[Stream]:
    return Driver(runner(), ROWS, LEN // BLOCK).run(list(streams), chunk)


@cache
def tokenizer() -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def chat(text: str) -> list[int]:
    """The ids of one user turn."""
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids: list[int] = tokenizer().encode(whole, add_special_tokens=True).ids
    return ids


PROMPTS = [
    "What is the capital of Hungary?",
    "What is 47 + 385?",
    "Write a Python function that adds two numbers.",
    "Hi",
]


@cache
def reference() -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_greedy_equals_transformers() -> None:
    streams = [Stream(chat(text), GREEDY, 40, joins=i) for i, text in enumerate(PROMPTS)]
    for stream in drive(*streams, chunk=7):
        ids = torch.tensor([stream.prompt])
        with torch.no_grad():
            whole = reference().generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, min_new_tokens=40,
                suppress_tokens=None, pad_token_id=4, eos_token_id=4095,
            )  # fmt: skip
        assert stream.output == whole[0, len(stream.prompt) :].tolist()


def test_prompt_log_probabilities_equal_transformers() -> None:
    prompt = chat(PROMPTS[2])
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1)
    for chunk in (1 << 30, 5, 1):
        (stream,) = drive(Stream(prompt, sampling, 1), chunk=chunk)
        with torch.no_grad():
            values = torch.log_softmax(reference()(torch.tensor([prompt])).logits[0].double(), -1)
        assert len(stream.prompt_logprobs) == len(prompt) - 1
        for i, entry in enumerate(stream.prompt_logprobs):
            assert entry.logprob == pytest.approx(float(values[i, prompt[i + 1]]), abs=2e-4)
            assert entry.rank == int((values[i] > values[i, prompt[i + 1]]).sum())
            assert entry.top_ids == values[i].topk(2).indices.tolist()
        assert stream.logprobs[0].logprob == pytest.approx(float(values[-1].max()), abs=2e-4)
        assert len(stream.logprobs[0].top_ids) == 1


def same(one: Stream, other: Stream) -> None:
    assert one.output == other.output
    assert len(one.logprobs) == len(other.logprobs)
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert a.top_logprobs == pytest.approx(b.top_logprobs, abs=1e-4)


def stream(sampling: SamplingParams, count: int = 24, **more: Any) -> Stream:
    return Stream(chat(PROMPTS[0]), sampling, count, eos_ids=(1, 3), **more)


@cache
def undisturbed(name: str) -> Stream:
    return drive(stream({"greedy": GREEDY, "rich": RICH}[name]))[0]


@pytest.mark.parametrize("name", ["greedy", "rich"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.sets(st.integers(1, 23), max_size=4),
    chunk=st.sampled_from([1, 3, 16, 17, 1000]),
    mates=st.integers(0, 4),
    joins=st.integers(0, 6),
)
def test_mates_chunks_and_preemptions_change_nothing(
    name: str, cuts: set[int], chunk: int, mates: int, joins: int
) -> None:
    sampling = {"greedy": GREEDY, "rich": RICH}[name]
    rng = random.Random(mates)
    others = [
        Stream(
            chat(PROMPTS[i % 4]),
            rng.choice([GREEDY, SamplingParams(seed=i, logprobs=5, top_p=0.8), SamplingParams(seed=i, min_p=0.1)]),
            rng.randint(3, 30),
            joins=rng.randint(0, 9),
            cuts={rng.randint(1, 9)},
        )
        for i in range(mates)
    ]
    mine = stream(sampling, cuts=set(cuts), joins=joins)
    drive(*others, mine, chunk=chunk)
    same(mine, undisturbed(name))


def test_min_tokens_holds_back_end_of_sequence_and_stop_ids() -> None:
    free = drive(stream(GREEDY, 20))[0].output
    end = free.index(3)
    held = SamplingParams(temperature=0.0, min_tokens=end + 4, stop_token_ids=(free[1],))
    output = drive(stream(held, 20, cuts={end}))[0].output
    assert not {1, 3, free[1]} & set(output[: end + 4])


def test_choices_and_seeds_differ_and_repeat() -> None:
    sampling = SamplingParams(temperature=1.0, seed=3)
    first = [s.output for s in drive(*(stream(sampling, choice=c) for c in range(3)))]
    again = [s.output for s in drive(*(stream(sampling, choice=c) for c in (2, 0, 1)))]
    assert first == [again[1], again[2], again[0]]
    assert len({tuple(output) for output in first}) == 3


def test_the_next_step_reads_what_the_last_one_drew() -> None:
    """Step N+1 is launched before the results of step N are looked at."""
    wanted = undisturbed("greedy").output
    prompt = chat(PROMPTS[0])
    blocks = [RowBlocks(2, 0, 0, list(range(9, 9 + LEN // BLOCK)))]
    pending = []
    for step in range(10):
        start = 0 if step == 0 else len(prompt) + step - 1
        batch = Batch("", step, [Scheduled(2, start, len(prompt) if step == 0 else 1, True)])
        if step == 0:
            new = NewSequence(2, 0, prompt, [], GREEDY)
            batch = Batch("", step, batch.scheduled, [new], blocks=blocks, reset=True)
        runner().forward(batch)
        pending.append(runner().sample())
    assert [one.results()[0].token_ids[0] for one in pending] == wanted[:10]


def test_blocks_are_copied_before_the_step() -> None:
    """A fork that shares full blocks and gets a copy of the last one goes on as its parent does."""
    prompt = chat(PROMPTS[2])
    full = len(prompt) // BLOCK
    mine = [*range(full), 30]
    own = [*range(full), 31, 32]
    sampling = SamplingParams(temperature=0.0, logprobs=0)
    new = NewSequence(0, 0, prompt, [], sampling)
    parent = Batch("", 1, [Scheduled(0, 0, len(prompt), True)], [new], blocks=[RowBlocks(0, 0, 0, mine)], reset=True)
    runner().forward(parent)
    drawn = runner().sample().results()[0].token_ids
    fork = NewSequence(1, 1, prompt, drawn, sampling)
    tables = [RowBlocks(1, 0, 0, own)]
    share = [Scheduled(0, len(prompt), 1, True), Scheduled(1, len(prompt), 1, True)]
    runner().forward(Batch("", 2, share, [fork], [], tables, [BlockCopy(0, 30, 31)]))
    results = runner().sample().results()
    assert results[0].token_ids == results[1].token_ids
    assert results[0].logprobs[0].logprob == pytest.approx(results[1].logprobs[0].logprob, abs=1e-5)


@pytest.mark.parametrize("make", [lambda: [4096], lambda: [-1], lambda: [5] * (LEN + 2)])
def test_impossible_rows_are_refused_and_the_runner_goes_on(make: Callable[[], list[int]]) -> None:
    new = NewSequence(1, 0, make(), [], GREEDY)
    with pytest.raises(BadRow) as caught:
        runner().forward(Batch("", 1, [Scheduled(1, 0, 1, True)], [new], reset=True))
    assert caught.value.rows == [1]
    same(drive(stream(GREEDY))[0], undisturbed("greedy"))
