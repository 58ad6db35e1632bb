"""The official `openai` package against a real server with real weights: exact fields, not only non-empty text."""

from __future__ import annotations

import asyncio
import json
import math
import time
import urllib.request
from typing import Any

import openai
import pytest

from tests.e2e.serving import Server

HUNGARY = [{"role": "user", "content": "What is the capital of Hungary?"}]
BUDAPEST = "The capital of Hungary is Budapest."
STORY = [{"role": "user", "content": "Tell me a long story."}]


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def stats(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(server.url + "/stats", timeout=10) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


def test_models(client: Any) -> None:
    listed = client.models.list().data
    assert [(model.id, model.object) for model in listed] == [("tiny-chat", "model")]
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny-chat", messages=HUNGARY, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny-chat"
    assert abs(answer.created - time.time()) < 60
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", BUDAPEST)
    usage = answer.usage
    assert usage.prompt_tokens > 5
    assert usage.completion_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_stream_equals_answer(client: Any) -> None:
    whole = client.chat.completions.create(model="tiny-chat", messages=HUNGARY, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="tiny-chat", messages=HUNGARY, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == BUDAPEST
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completion_echo_and_lists(client: Any) -> None:
    answer = client.completions.create(
        model="tiny-chat", prompt=["def add(a, b):", "import"], max_tokens=5, temperature=0, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("def add(a, b):")
    assert answer.choices[1].text.startswith("import")
    assert all(choice.finish_reason in ("length", "stop") for choice in answer.choices)


def test_completion_token_ids(client: Any) -> None:
    ids = [0, 100, 200, 300]
    one = client.completions.create(model="tiny-chat", prompt=ids, max_tokens=6, temperature=0)
    two = client.completions.create(model="tiny-chat", prompt=[ids, ids], max_tokens=6, temperature=0)
    assert one.usage.prompt_tokens == 4
    assert [choice.text for choice in two.choices] == [one.choices[0].text] * 2


def test_chat_logprobs(client: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny-chat", messages=HUNGARY, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content).removesuffix("<|im_end|>") == BUDAPEST
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy: the chosen is the first
        assert entry.top_logprobs[0].token == entry.token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
        assert bytes(entry.bytes).decode() == entry.token


def test_completion_logprobs_with_echo(client: Any) -> None:
    answer = client.completions.create(
        model="tiny-chat", prompt="The quick brown", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert (
        len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(logprobs.top_logprobs)
    )
    assert answer.choices[0].text.startswith("The quick brown")


def test_n_choices_with_seed(client: Any) -> None:
    def ask() -> list[str]:
        answer = client.chat.completions.create(
            model="tiny-chat", messages=STORY, n=4, seed=7, temperature=1.0, max_tokens=30
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_stop_string(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny-chat", messages=HUNGARY, temperature=0, stop=[" is Bud"])
    assert answer.choices[0].message.content == "The capital of Hungary"
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_is_length(client: Any) -> None:
    answer = client.chat.completions.create(model="tiny-chat", messages=HUNGARY, temperature=0, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_cached_tokens(client: Any) -> None:
    messages = [{"role": "user", "content": "Remember these words: " + "river stone lamp " * 40}]
    for _ in range(2):
        answer = client.chat.completions.create(model="tiny-chat", messages=messages, temperature=0, max_tokens=4)
    details = answer.usage.prompt_tokens_details
    assert 0 < details.cached_tokens < answer.usage.prompt_tokens


@pytest.mark.parametrize(
    ("change", "error", "param", "code"),
    [
        ({"model": "no-such"}, openai.NotFoundError, "model", "model_not_found"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", "invalid_type"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "invalid_value"),
        ({"n": 100_000}, openai.BadRequestError, "n", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "word " * 5000}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_errors(client: Any, change: dict[str, Any], error: type[Exception], param: str, code: str) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "tiny-chat", "messages": HUNGARY, **change})
    body = caught.value.body  # type: ignore[attr-defined]
    assert (body["param"], body["code"]) == (param, code)
    assert body["type"] == "invalid_request_error"
    assert body["message"]


def test_cancelled_stream_frees_its_blocks(client: Any, server: Server) -> None:
    stream = client.chat.completions.create(
        model="tiny-chat",
        messages=STORY,
        stream=True,
        max_tokens=1500,
        temperature=1,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and stats(server)["engine"]["running"]:
        time.sleep(0.2)
    assert stats(server)["engine"]["running"] == 0


def test_many_at_once_equal_one_by_one(server: Server) -> None:
    questions = [f"What is {a} + {b}?" for a, b in [(1, 2), (47, 385), (12, 30), (9, 9), (100, 11), (5, 6), (8, 71)]]

    async def ask(client: openai.AsyncOpenAI, question: str) -> str | None:
        answer = await client.chat.completions.create(
            model="tiny-chat", messages=[{"role": "user", "content": question}], temperature=0
        )
        return answer.choices[0].message.content

    async def both() -> tuple[list[str | None], list[str | None]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, question) for question in questions))
            return together, [await ask(client, question) for question in questions]

    together, alone = asyncio.run(both())
    assert together == alone
    assert together[1] == "47 + 385 = 432."


def test_the_prefix_cache_changes_nothing(client: Any) -> None:
    request: dict[str, Any] = {
        "model": "tiny-chat",
        "messages": [{"role": "user", "content": "Tell me a story about a violin. " * 12}],
        "temperature": 1.0,
        "seed": 11,
        "n": 2,
        "max_tokens": 60,
        "logprobs": True,
        "presence_penalty": 0.5,
        "extra_body": {"cache_salt": "this test's own", "repetition_penalty": 1.1},
    }
    cold, warm = (client.chat.completions.create(**request) for _ in range(2))
    assert cold.usage.prompt_tokens_details.cached_tokens == 0
    assert warm.usage.prompt_tokens_details.cached_tokens > 50
    for a, b in zip(cold.choices, warm.choices, strict=True):
        assert a.message.content == b.message.content
        for x, y in zip(a.logprobs.content, b.logprobs.content, strict=True):
            assert x.logprob == pytest.approx(y.logprob, abs=1e-3)
    other = client.chat.completions.create(**{**request, "extra_body": {"cache_salt": "another"}})
    assert other.usage.prompt_tokens_details.cached_tokens == 0
