"""Constrained rows of models/runtime/runner.py, with tiny-chat on the CPU."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from core.grammar import load_grammars
from core.messages import Batch, NewSequence, RowBlocks, Scheduled
from core.model_info import resolve
from models.runtime.worker import Worker
from quire import SamplingParams, StructuredOutputs
from tests.models.runtime.driving import Driver, Stream
from tests.models.runtime.test_runner import BLOCK, LEN, ROWS, chat, drive, runner, tokenizer

MODEL = resolve("tiny-chat", max_model_len=LEN)
GRAMMARS = load_grammars(MODEL)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WANTED = StructuredOutputs(json=json.dumps(SCHEMA))
PROMPT = chat("Who is the king of Hungary?")
EOS = tuple(MODEL.eos_ids)


def constrained(wanted: StructuredOutputs | None = WANTED, **others: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=wanted, **others)


def text(stream: Stream) -> str:
    """The output before the end of the sequence, which must be there."""
    end = min(stream.output.index(token) for token in EOS if token in stream.output)
    decoded: str = tokenizer().decode(stream.output[:end], skip_special_tokens=False)
    return decoded


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_output_follows_the_schema(temperature: float) -> None:
    streams = [Stream(PROMPT, constrained(temperature=temperature, seed=seed), 80, joins=seed) for seed in range(8)]
    for stream in drive(*streams, chunk=7):
        answer = json.loads(text(stream))
        assert list(answer) == ["name", "age"]
        assert len(answer["name"]) <= 12
        assert answer["age"] <= 99


def test_every_token_is_one_that_the_library_allows() -> None:
    rich = constrained(seed=3, temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.3, logprobs=2)
    (stream,) = drive(Stream(PROMPT, rich, 60))
    matcher = GRAMMARS.compile(WANTED)
    assert stream.logprobs[0].rank > 0  # log-probabilities are those before the mask
    for token in stream.output:
        assert matcher.allowed()[token // 32] >> token % 32 & 1
        if token in EOS:
            break
        assert matcher.take([token])
    assert matcher.complete


def test_neither_batch_mates_nor_preemption_nor_chunks_change_it() -> None:
    rich = constrained(seed=5, temperature=1.2)
    free = SamplingParams(seed=5, temperature=1.2)
    (alone,) = drive(Stream(PROMPT, rich, 60))
    (free_alone,) = drive(Stream(PROMPT, free, 60))
    cut, free_mate, *_ = drive(
        Stream(PROMPT, rich, 60, cuts={1, 7, 8, 30}), Stream(PROMPT, free, 60, joins=3), Stream(PROMPT[2:], rich, 30),
        chunk=5,
    )  # fmt: skip
    assert cut.output == alone.output
    assert free_mate.output == free_alone.output


def test_a_row_is_free_again_after_a_constrained_sequence() -> None:
    free = SamplingParams(temperature=0.0)
    (before,) = drive(Stream(PROMPT, free, 20))
    driver = Driver(runner(), 1, LEN // BLOCK)
    driver.run([Stream(PROMPT, constrained(seed=1), 20)])
    (after,) = driver.run([Stream(PROMPT, free, 20)])
    assert after.output == before.output


@pytest.mark.parametrize("others", [{"min_tokens": 12}, {"ignore_eos": True}])
def test_the_grammar_wins_over_what_holds_the_end_back(others: dict[str, Any]) -> None:
    answer = StructuredOutputs(choice=("yes", "no"))
    (stream,) = drive(Stream(PROMPT, constrained(answer, seed=2, **others), 20, eos_ids=EOS))
    assert text(stream) in ("yes", "no")


def test_min_tokens_is_kept_where_the_grammar_allows_more() -> None:
    digits = StructuredOutputs(regex="[0-9]+")
    bias = dict.fromkeys(EOS, 100.0)
    (short,) = drive(Stream(PROMPT, constrained(digits, seed=2, logit_bias=bias), 20, eos_ids=EOS))
    (long,) = drive(Stream(PROMPT, constrained(digits, seed=2, logit_bias=bias, min_tokens=9), 20, eos_ids=EOS))
    assert short.output[1] in EOS
    assert long.output[9] in EOS
    assert text(long).isdigit()


@pytest.mark.parametrize(
    ("wanted", "output_ids"),
    [
        (StructuredOutputs(regex="("), []),  # a tokenizer process refuses it before
        (WANTED, [77]),  # not the grammar's
        (StructuredOutputs(grammar="start: p+ T\np: " + "|".join(f"A{i}" for i in range(3000)) + "\nT: /[a-z]*/\n" +
         "\n".join(f"A{i}: /{{[a-z]*{i}/" for i in range(3000))), []),  # more than it may cost
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_go_on_ends_its_own_row(wanted: StructuredOutputs, output_ids: list[int]) -> None:
    (free,) = drive(Stream(PROMPT, SamplingParams(temperature=0.0), 1))
    new = [
        NewSequence(0, 0, PROMPT, output_ids, constrained(wanted)),
        NewSequence(1, 0, PROMPT, [], SamplingParams(temperature=0.0)),
    ]
    scheduled = [Scheduled(0, 0, len(PROMPT + output_ids), True), Scheduled(1, 0, len(PROMPT), True)]
    blocks = [RowBlocks(row, 0, 0, [row * 8 + i for i in range(8)]) for row in range(2)]
    assert ROWS * LEN // BLOCK >= 16
    runner().forward(Batch("", 1, scheduled, new, [], blocks, reset=True))
    failed, well = runner().sample().results()
    assert failed.grammar_error
    assert failed.token_ids == []
    assert (well.token_ids, well.grammar_error) == (free.output, "")


def test_a_step_waits_for_the_token_before_only_with_a_grammar() -> None:
    one = runner()
    for sampling, waits in ((SamplingParams(), False), (constrained(), True)):
        new = NewSequence(0, 0, PROMPT, [], sampling)
        one.forward(Batch("", 1, [Scheduled(0, 0, len(PROMPT), True)], [new], [], [RowBlocks(0, 0, 0, [1, 2, 3, 4])]))
        assert not one.needs_results  # nothing was drawn before
        step = one.sample()
        one.forward(Batch("", 2, [Scheduled(0, len(PROMPT), 1, True)]))
        assert one.needs_results is waits
        step.results()
        assert not one.needs_results
        one.sample().results()


class Inbox:
    """A Channel that brings all Batches at once, and keeps the answers."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.sent: list[Any] = []

    def receive(self, timeout_s: float) -> list[Any] | None:
        batches, self.batches = self.batches, []
        return batches or None

    def send(self, messages: list[Any]) -> None:
        self.sent += messages


@pytest.mark.parametrize("wanted", [WANTED, None])
def test_one_step_ahead_gives_the_tokens_of_step_by_step(monkeypatch: pytest.MonkeyPatch, wanted: Any) -> None:
    """As on a device with a queue: Batch N+1 is launched before the answer to N; a grammar's rows wait in between."""
    sampling = constrained(wanted, seed=5, temperature=1.2)
    (expected,) = drive(Stream(PROMPT, sampling, 20))
    one = runner()
    monkeypatch.setattr(one, "depth", 2)
    new = NewSequence(3, 0, PROMPT, [], sampling)
    blocks = RowBlocks(3, 0, 0, [5, 9, 2, 7])
    batches = [Batch("", 1, [Scheduled(3, 0, len(PROMPT), True)], [new], [], [blocks], reset=True)]
    batches += [Batch("", step + 1, [Scheduled(3, len(PROMPT) + step - 1, 1, True)]) for step in range(1, 20)]
    inbox = Inbox(batches)
    worker = Worker(cast(Any, SimpleNamespace(index=0)), cast(Any, inbox), one)
    worker.receive(0.0)
    most = 0
    while worker.inbox:
        worker.launch(worker.inbox.popleft())
        most = max(most, len(worker.launched))
        while len(worker.launched) >= one.depth:
            worker.answer(worker.launched.popleft())
    while worker.launched:
        worker.answer(worker.launched.popleft())
    assert [answer.results[0].token_ids[0] for answer in inbox.sent] == expected.output
    assert [answer.step for answer in inbox.sent] == list(range(1, 21))
    assert most == (2 if wanted is None else 1)
