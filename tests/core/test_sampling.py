"""Ranges of SamplingParams: the edges pass, what lies beyond is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from core.errors import QuireError
from core.sampling import SamplingLimits, validate
from quire import SamplingParams, StructuredOutputs

LIMITS = SamplingLimits(vocab_size=100, max_model_len=50)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 1.0},
        {"n": 128, "presence_penalty": -2.0, "frequency_penalty": 2.0, "repetition_penalty": 0.01},
        {"logit_bias": {0: -100.0, 99: 100.0}, "stop_token_ids": (0, 99), "stop": ("x",) * 64},
        {"min_tokens": 5, "max_tokens": 5, "logprobs": 20, "prompt_logprobs": 0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "max_tokens": 2**63 - 1},
    ],
)
def test_edges_pass(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert validate(params, LIMITS) is params


def test_a_schema_becomes_its_text() -> None:
    wanted = StructuredOutputs(json={"type": "object", "title": "é"}, source="guided_json")
    (text,) = {validate(SamplingParams(structured_outputs=w), LIMITS).structured_outputs for w in [wanted] * 2}
    assert text == StructuredOutputs(json='{"type": "object", "title": "\\u00e9"}', source="guided_json")
    with pytest.raises(QuireError, match="source has more than 64 characters"):
        validate(SamplingParams(structured_outputs=StructuredOutputs(regex="a", source="x" * 65)), LIMITS)


def test_minus_one_turns_top_k_off() -> None:
    assert validate(SamplingParams(top_k=-1, n=2), LIMITS) == SamplingParams(top_k=0, n=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("temperature", -0.01),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 2**70),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("min_tokens", -1),
        ("min_tokens", 51),
        ("max_tokens", 0),
        pytest.param("max_tokens", 10**5000, id="max_tokens-5000-digits"),
        ("seed", 2**63),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("stop", ("x",) * 65),
        ("stop", ("",)),
        ("stop", ("x" * 1025,)),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1,) * 257),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: math.nan}),
    ],
)
def test_beyond_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(QuireError) as caught:
        validate(SamplingParams(**{field: value}), LIMITS)
    assert (caught.value.code, caught.value.param) == ("invalid_value", field)
    assert field in caught.value.message
    assert len(caught.value.message) < 200
