"""Which sampling parameters are allowed: every range and every limit, checked once at the edge.

`validate` is what both doors call; past it no code asks again. The names in the errors are the fields of
SamplingParams, which are also the fields of the HTTP API.
"""

from __future__ import annotations

import json
import math

import msgspec

from core.errors import QuireError
from quire import SamplingParams, StructuredOutputs

INT64_MAX = 2**63 - 1
_MAX_SOURCE_CHARS = 64


class SamplingLimits(msgspec.Struct, frozen=True):
    """What one request may ask for. The first two are the model's; the others bound work and memory.

    `max_logprobs` is OpenAI's 20. A stop string's length bounds the text that must be held back.
    """

    vocab_size: int
    max_model_len: int
    max_n: int = 128
    max_stop: int = 64
    max_stop_chars: int = 1024
    max_stop_token_ids: int = 256
    max_logit_bias: int = 1024
    max_logprobs: int = 20


def validate(params: SamplingParams, limits: SamplingLimits) -> SamplingParams:
    """Check every field and return the parameters in one spelling: top_k -1 (often "off") as 0, a schema as text.

    Raises QuireError("invalid_value") naming field, value and range.
    """
    _whole("n", params.n, 1, limits.max_n)
    _real("temperature", params.temperature, 0.0, 100.0)
    _whole("top_k", params.top_k, -1, INT64_MAX)
    _real("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0.0:
        raise _wrong("top_p", params.top_p, "must be above 0 and at most 1")
    _real("min_p", params.min_p, 0.0, 1.0)
    _real("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _real("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _real("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    _whole("min_tokens", params.min_tokens, 0, limits.max_model_len)
    if params.max_tokens is not None:
        _whole("max_tokens", params.max_tokens, 1, INT64_MAX)
        if params.min_tokens > params.max_tokens:
            raise _wrong("min_tokens", params.min_tokens, f"must not exceed max_tokens ({params.max_tokens})")
    if params.seed is not None:
        _whole("seed", params.seed, -INT64_MAX - 1, INT64_MAX)
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None:
            _whole(name, value, 0, min(limits.max_logprobs, limits.vocab_size))
    _check_stops(params, limits)
    _check_logit_bias(params.logit_bias, limits)
    if params.structured_outputs is not None:
        params = msgspec.structs.replace(params, structured_outputs=_plain(params.structured_outputs))
    return msgspec.structs.replace(params, top_k=0) if params.top_k == -1 else params


def _plain(wanted: StructuredOutputs) -> StructuredOutputs:
    """With a schema as its JSON text, which passes from process to process as it is, and can be looked up.

    Whether it can be used at all is seen where it is compiled, by the tokenizer process.
    """
    if len(wanted.source) > _MAX_SOURCE_CHARS:
        text = f"structured_outputs.source has more than {_MAX_SOURCE_CHARS} characters"
        raise QuireError("invalid_value", text, "structured_outputs")
    if wanted.json is None or isinstance(wanted.json, str):
        return wanted
    try:
        return msgspec.structs.replace(wanted, json=json.dumps(wanted.json))
    except (ValueError, RecursionError) as error:
        raise QuireError("invalid_grammar", f"{wanted.source}: {error}", wanted.source) from None


def _check_stops(params: SamplingParams, limits: SamplingLimits) -> None:
    if len(params.stop) > limits.max_stop:
        raise QuireError("invalid_value", f"stop has {len(params.stop)} strings; at most {limits.max_stop}", "stop")
    for text in params.stop:
        if not text:
            raise QuireError("invalid_value", "stop holds an empty string, which would match at once", "stop")
        if len(text) > limits.max_stop_chars:
            message = f"stop holds a string of {len(text)} characters; at most {limits.max_stop_chars}"
            raise QuireError("invalid_value", message, "stop")
    if len(params.stop_token_ids) > limits.max_stop_token_ids:
        message = f"stop_token_ids has {len(params.stop_token_ids)} ids; at most {limits.max_stop_token_ids}"
        raise QuireError("invalid_value", message, "stop_token_ids")
    for token_id in params.stop_token_ids:
        _whole("stop_token_ids", token_id, 0, limits.vocab_size - 1)


def _check_logit_bias(bias: dict[int, float], limits: SamplingLimits) -> None:
    if len(bias) > limits.max_logit_bias:
        message = f"logit_bias has {len(bias)} entries; at most {limits.max_logit_bias}"
        raise QuireError("invalid_value", message, "logit_bias")
    for token_id, value in bias.items():
        if not 0 <= token_id < limits.vocab_size:
            raise _wrong("logit_bias", token_id, f"names no token; ids are 0 to {limits.vocab_size - 1}")
        _real("logit_bias", value, -100.0, 100.0)


def _real(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):  # NaN fails isfinite
        raise _wrong(name, value, f"must be between {low:g} and {high:g}")


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        limit = f"must be at least {low}" if high == INT64_MAX else f"must be between {low} and {high}"
        raise _wrong(name, value, limit)


def _wrong(name: str, value: object, rule: str) -> QuireError:
    huge = isinstance(value, int) and value.bit_length() > 128  # Python refuses to print integers of 4,300 digits
    shown = "a huge number" if huge else repr(value)
    return QuireError("invalid_value", f"{name}: {shown} {rule}", name)
