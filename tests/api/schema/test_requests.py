"""Whatever JSON a client sends, parsing gives a valid request or a QuireError of the 4xx kind that names the field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.schema.chat import ChatBody, chat_request
from api.schema.completions import CompletionBody, completion_request
from core.errors import QuireError, http_status
from core.messages import ChatPrompt, TextPrompt
from tests.api.serving import MODEL

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["auto", "none", "user", "text", "function", "tiny-chat"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "function", "name", "1"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def body_of(kind: type[msgspec.Struct], base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    fields = st.sampled_from(kind.__struct_encode_fields__)
    return st.dictionaries(fields, VALUES, max_size=4).map(lambda some: {**base, **some})


def check_refusal(error: QuireError) -> None:
    assert 400 <= http_status(error.code) < 500
    assert error.param
    assert error.param.split(".")[0].split("[")[0] in error.message


@settings(max_examples=400, deadline=None)
@given(body_of(ChatBody, GOOD))
def test_chat(body: dict[str, Any]) -> None:
    try:
        request = chat_request(msgspec.json.encode(body), MODEL, strict_fields=False)
    except QuireError as error:
        check_refusal(error)
    else:
        assert isinstance(request.prompt, ChatPrompt)
        assert msgspec.json.decode(request.prompt.messages)


@settings(max_examples=400, deadline=None)
@given(body_of(CompletionBody, {"prompt": "hi"}))
def test_completion(body: dict[str, Any]) -> None:
    try:
        request = completion_request(msgspec.json.encode(body), MODEL, strict_fields=False)
    except QuireError as error:
        check_refusal(error)
    else:
        assert request.prompts
        assert request.sampling.max_tokens is not None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes(body: bytes) -> None:
    with pytest.raises(QuireError) as caught:
        chat_request(body, MODEL, strict_fields=False)
    assert http_status(caught.value.code) == 400


def test_nothing_but_defaults() -> None:
    request = completion_request(b'{"prompt": "hi"}', MODEL, strict_fields=True)
    assert request.prompts == [TextPrompt("hi")]
    assert request.sampling == msgspec.structs.replace(MODEL.defaults, max_tokens=16)
    nulls = {field: None for field in CompletionBody.__struct_encode_fields__ if field != "prompt"}
    again = completion_request(msgspec.json.encode({"prompt": "hi", **nulls}), MODEL, strict_fields=True)
    assert again == request
