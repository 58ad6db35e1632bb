"""core.grammar: what a mask allows parses, what it does not allow is refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from core.errors import QuireError
from core.grammar import MAX_CHARS, Grammars
from core.model_info import BUILTIN
from core.text_codec import TextCodec
from quire import StructuredOutputs

CODEC = TextCodec(BUILTIN["tiny-chat"])
EOS = 3
GRAMMARS = Grammars(CODEC, 4096, [EOS])


def draw(wanted: StructuredOutputs, seed: int) -> str:
    """A text by uniform draws from what is allowed."""
    rng, matcher, ids = random.Random(seed), GRAMMARS.compile(wanted), list[int]()
    for _ in range(2000):
        bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
        token = rng.choice(np.flatnonzero(bits).tolist())
        assert matcher.take([token])
        if token == EOS:
            return CODEC.decode(ids, False)
        ids.append(token)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(10))
def test_random_schema(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [{"type": "boolean"}, {"enum": ["a", 'b"c', 3, None]}, {"type": "string", "maxLength": 8}]
    names = [f"p{i}" for i in range(rng.randint(1, 5))]
    schema = {"type": "object", "properties": {n: rng.choice(kinds) for n in names}, "required": names,
              "additionalProperties": False}  # fmt: skip
    assert sorted(json.loads(draw(StructuredOutputs(json=schema), seed))) == sorted(names)


def test_choice_and_regex() -> None:
    assert {draw(StructuredOutputs(choice=("yes", "n o")), s) for s in range(20)} == {"yes", "n o"}
    texts = ("", 'quo"te', "back\\slash", "a\nb", "😀", *[f"number {i}" for i in range(4000)])
    assert draw(StructuredOutputs(choice=texts), 1) in texts
    assert draw(StructuredOutputs(regex="[0-9]{3}"), 1).isdigit()


@pytest.mark.parametrize(
    "wanted",
    [
        StructuredOutputs(), StructuredOutputs(regex="("), StructuredOutputs(json="{"), StructuredOutputs(choice=()),
        StructuredOutputs(regex="a", json_object=True), StructuredOutputs(grammar="start: nothing"),
        StructuredOutputs(regex="a" * (MAX_CHARS + 1)), StructuredOutputs(json={"type": "nonsense"}),
        StructuredOutputs(json={"type": "integer", "multipleOf": 99_999_989}),
        StructuredOutputs(json='{"type": "integer", "multipl\\u0065Of": 1e7}'),
        StructuredOutputs(json={"type": "number", "multipleOf": 1.00001}),
        StructuredOutputs(grammar='start: %json {"multipleOf": 99999989}'),
        StructuredOutputs(json={"anyOf": [{"properties": {f"p{i}{j}": {} for i in range(20)}} for j in range(200)]}),
    ],
)  # fmt: skip
def test_refused(wanted: StructuredOutputs) -> None:
    with pytest.raises(QuireError, match="structured_outputs: ") as error:
        GRAMMARS.compile(wanted)
    assert error.value.code == "invalid_grammar"


@pytest.mark.parametrize("vocab_size", [4000, 4097, 5003])
def test_a_model_whose_vocabulary_is_not_the_tokenizers(vocab_size: int) -> None:
    matcher = Grammars(CODEC, vocab_size, [EOS, 10**6]).compile(StructuredOutputs(regex="(.|\n)*"))
    bits = np.unpackbits(matcher.allowed().view(np.uint8), bitorder="little")
    assert len(bits) == -(-vocab_size // 32) * 32
    allowed = set(np.flatnonzero(bits).tolist())
    assert EOS in allowed
    assert allowed - {EOS} <= set(range(min(vocab_size, CODEC.num_ids))) - CODEC.special_ids
    assert len(allowed) > 3500


def test_a_model_without_an_end() -> None:
    with pytest.raises(QuireError, match="end-of-sequence token"):
        Grammars(CODEC, 4096, [])


def test_large_multiples_of_ten_are_no_exception() -> None:
    assert int(draw(StructuredOutputs(json={"type": "integer", "multipleOf": 2.5e2}), 1)) % 250 == 0
    with pytest.raises(QuireError, match="at most 10000"):
        GRAMMARS.compile(StructuredOutputs(json={"type": "integer", "multipleOf": 1_000_000}))


def test_an_ambiguous_grammar_ends_before_it_costs_much() -> None:
    """Each token costs more than the one before; the limit is a count of work, so every rank ends at the same one."""
    lengths = []
    for _ in range(2):
        matcher = GRAMMARS.compile(StructuredOutputs(grammar='start: e\ne: e e | "a"'))
        (token,) = CODEC.encode("a", False)
        count = 0
        while not matcher.error:
            matcher.allowed()
            matcher.take([token])
            count += 1
        lengths.append(count)
        assert matcher.ended
        assert "items" in matcher.error
    assert 50 < lengths[0] == lengths[1] < 400
