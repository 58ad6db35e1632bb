"""Load: exact lengths, shared prefixes, and the same requests for the same seed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from core.errors import QuireError
from tools.bench.load import Load

TOKENIZER = str(Path(__file__).parents[3] / "models/builtin/tiny-chat/tokenizer.json")
LOAD = Load("http://h", "m", 12, 4, prompt_tokens=40, output_tokens=100, vocab_size=64)


def test_prompts_are_token_ids_of_exact_length() -> None:
    prompts = [LOAD.prompt(index) for index in range(12)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert all(isinstance(prompt, list) and all(5 <= token < 64 for token in prompt) for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == 12
    assert LOAD.prompt(3) == dataclasses.replace(LOAD, concurrency=9).prompt(3)
    assert LOAD.prompt(3) != dataclasses.replace(LOAD, seed=1).prompt(3)


def test_shared_prefixes_by_group() -> None:
    shared = dataclasses.replace(LOAD, shared_prefix=30, prefix_groups=2)
    prompts = [shared.prompt(index) for index in range(4)]
    assert {len(prompt) for prompt in prompts} == {40}
    assert prompts[0][:30] == prompts[2][:30] != prompts[1][:30] == prompts[3][:30]
    assert len({tuple(prompt[30:]) for prompt in prompts}) == 4


def test_output_lengths_spread_around_their_mean() -> None:
    assert {LOAD.max_tokens(index) for index in range(12)} == {100}
    spread = dataclasses.replace(LOAD, output_spread=0.5)
    lengths = [spread.max_tokens(index) for index in range(400)]
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(set(lengths)) > 20
    assert abs(sum(lengths) / 400 - 100) < 8


def test_the_body_asks_for_a_stream_of_exact_length_with_usage() -> None:
    body = json.loads(LOAD.body(2))
    assert body["prompt"] == LOAD.prompt(2)
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("m", 100, True, True)
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("length", "prefix"), [(1, 0), (2, 0), (2, 1), (17, 9), (300, 0), (300, 256)])
def test_texts_have_exact_lengths(length: int, prefix: int) -> None:
    load = dataclasses.replace(LOAD, tokenizer=TOKENIZER, prompt_tokens=length, shared_prefix=prefix)
    tokenizer = Tokenizer.from_file(TOKENIZER)
    texts = [load.prompt(index) for index in range(8)]
    counts = {len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts if isinstance(text, str)}
    assert counts == {length}
    assert len(set(texts)) > 1


def test_chat_puts_the_new_message_after_the_history() -> None:
    load = dataclasses.replace(LOAD, chat=True, tokenizer=TOKENIZER, turns=3, overhead=5)
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages = json.loads(load.body(1, history))["messages"]
    assert messages[:2] == history
    assert messages[2] == {"role": "user", "content": load.prompt(1)}
    assert (load.path, load.conversations) == ("/v1/chat/completions", 4)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"chat": True}, "tokenizer"),
        ({"turns": 2}, "turns"),
        ({"chat": True, "tokenizer": TOKENIZER, "turns": 5}, "requests"),
        ({"shared_prefix": 40}, "prompt_tokens"),
        ({"overhead": 40}, "prompt_tokens"),
    ],
)
def test_loads_that_make_no_sense(changes: dict[str, object], param: str) -> None:
    with pytest.raises(QuireError) as error:
        dataclasses.replace(LOAD, **changes)  # type: ignore[arg-type]
    assert error.value.param == param


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    load = dataclasses.replace(LOAD, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(QuireError, match="--tokenizer"):
        load.prompt(0)
