"""The sampling fields that chat and completions share, and how they become SamplingParams."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from api.schema.deadline import deadline_s, earliest
from api.schema.structured import StructuredFields, structured_outputs
from api.served import ServedModel
from core.errors import QuireError
from core.sampling import validate
from quire import SamplingParams


class StreamOptions(msgspec.Struct):
    """`include_usage`: a last chunk without choices carries the usage, and all others `usage: null`."""

    include_usage: bool | None = None


class GenerationFields(StructuredFields, kw_only=True):
    """Fields of every generating request. None (absent or null) means the model's default.

    The second group is no part of OpenAI's API; the names are those that the field's servers share. The third asks for
    nothing that changes the answer, and is accepted as it is.
    """

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    timeout: float | None = None  # seconds from the request's arrival to its deadline
    timeout_s: float | None = None  # the same

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Any = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    spaces_between_special_tokens: bool | None = None


# Field -> values that ask for nothing beyond what is done; any other value is refused as unsupported.
NEUTRAL: dict[str, tuple[Any, ...]] = {"store": (False,), "service_tier": ("auto", "default")}

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "seed",
    "prompt_logprobs",
)
_MAX_PRIORITY = 2**31
_MAX_SALT_CHARS = 256
_MAX_USER_CHARS = 64


def sampling_params(
    fields: GenerationFields,
    raw: Mapping[str, Any],
    model: ServedModel,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """The checked SamplingParams of a request, whose fields came as `raw`. Raises QuireError."""
    given: dict[str, Any] = {}
    for name in _SAME_NAME:
        value = getattr(fields, name)
        if value is not None:
            given[name] = value
    if fields.stop is not None:
        given["stop"] = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    if fields.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(fields.stop_token_ids)
    if fields.logit_bias:
        given["logit_bias"] = _logit_bias(fields.logit_bias)
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    given["logprobs"] = logprobs
    if (wanted := structured_outputs(fields, raw)) is not None:
        given["structured_outputs"] = wanted
    return validate(msgspec.structs.replace(model.defaults, **given), model.limits)


def check_common(fields: GenerationFields) -> None:
    """What the shared fields must fulfil beside their types and the sampling ranges."""
    if fields.stream_options is not None and not fields.stream:
        raise QuireError("invalid_value", "stream_options is only allowed with stream: true", "stream_options")
    if fields.stream and fields.prompt_logprobs is not None:
        raise QuireError("unsupported", "prompt_logprobs is not supported with stream: true", "prompt_logprobs")
    if fields.priority is not None and not -_MAX_PRIORITY <= fields.priority < _MAX_PRIORITY:
        raise QuireError("invalid_value", "priority must fit in 32 bits", "priority")
    if fields.cache_salt is not None and len(fields.cache_salt) > _MAX_SALT_CHARS:
        raise QuireError("invalid_value", f"cache_salt is longer than {_MAX_SALT_CHARS} characters", "cache_salt")


def fields_deadline_s(fields: GenerationFields) -> float | None:
    """The deadline that the body sets. Raises QuireError("invalid_value")."""
    return earliest(deadline_s(fields.timeout, "timeout"), deadline_s(fields.timeout_s))


def user_of(fields: GenerationFields) -> str:
    """Which of the key's users asks: whose share of it this is. A long name by its hash."""
    return short_name(fields.user or fields.safety_identifier or "")


def short_name(name: str) -> str:
    """A name that is kept while requests wait, so it must be short."""
    if len(name) <= _MAX_USER_CHARS:
        return name
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise QuireError("invalid_value", f"logit_bias: {key[:40]!r} is not a token id", "logit_bias")
        result[int(key)] = float(value)
    return result
