"""The official client against the app over a fake tokenizer: what it parses is what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.serving import TEXT, FakeTokenizer


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0, timeout=10) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-chat", messages=[{"role": "user", "content": "hi"}], n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content][:2] == ["Hel", "lo"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-chat",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


def test_completions_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny-chat", prompt=["a", "b"], stream=True)
    texts = ["", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT, TEXT]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").owned_by == "quire"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "other", "prompt": "a"}, openai.NotFoundError),
        ({"model": "tiny-chat", "prompt": "a", "temperature": -1}, openai.BadRequestError),
        ({"model": "tiny-chat", "prompt": "busy"}, openai.RateLimitError),
        ({"model": "tiny-chat", "prompt": "fail"}, openai.InternalServerError),
    ],
)
def test_errors(client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError]) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**options)
    assert caught.value.code
    assert caught.value.request_id


def test_error_inside_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="rank 0 died"):
        list(client.completions.create(model="tiny-chat", prompt="fail", stream=True))


def test_cancel(client: openai.OpenAI, tokenizer: FakeTokenizer) -> None:
    before = len(tokenizer.aborted)
    stream = client.completions.create(model="tiny-chat", prompt="flood", stream=True)
    next(iter(stream))
    stream.close()
    tokenizer.wait_for_abort(before + 1)
