"""POST /v1/completions: the request, and the answer's objects."""

from __future__ import annotations

from typing import Any

import msgspec

from api.schema.parse import check_unsupported, parse
from api.schema.sampling import (
    NEUTRAL,
    GenerationFields,
    check_common,
    fields_deadline_s,
    sampling_params,
    user_of,
)
from api.schema.usage import Usage
from api.served import ServedModel
from core.errors import QuireError
from core.messages import Prompt, TextPrompt, TokensPrompt
from quire import SamplingParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class CompletionBody(GenerationFields, kw_only=True):
    """The JSON fields. `prompt`: text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None
    prompt_embeds: Any = None
    use_beam_search: bool | None = None


_NEUTRAL = {
    **NEUTRAL,
    "suffix": ("",),
    "prompt_embeds": (),
    "use_beam_search": (False,),
}


class CompletionRequest(msgspec.Struct, frozen=True):
    """A valid request: what to generate from, how, and how to write the answer."""

    prompts: list[Prompt]
    sampling: SamplingParams
    stream: bool
    include_usage: bool
    echo: bool
    drop_output: bool  # max_tokens 0 with echo: only the prompt is asked for; one token is generated and left out
    return_token_ids: bool
    priority: int
    cache_salt: str
    deadline_s: float | None
    user: str


class CompletionLogprobs(msgspec.Struct):
    """One entry per token; the first of an echoed prompt has None for its log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, omit_defaults=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None


class Completion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "text_completion"


def completion_request(body: bytes, model: ServedModel, *, strict_fields: bool) -> CompletionRequest:
    """Parse and check a body. Raises QuireError."""
    fields, raw = parse(body, CompletionBody, strict_fields=strict_fields)
    model.check_name(fields.model)
    check_common(fields)
    check_unsupported(raw, _NEUTRAL)
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise QuireError("unsupported", "best_of is not supported; leave it out or send the same as n", "best_of")
    echo = bool(fields.echo)
    drop_output = echo and fields.max_tokens == 0
    max_tokens = 1 if drop_output else DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    sampling = sampling_params(fields, raw, model, max_tokens=max_tokens, logprobs=fields.logprobs)
    if echo and fields.logprobs is not None and sampling.prompt_logprobs is None:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=fields.logprobs)
    return CompletionRequest(
        prompts=_prompts(fields.prompt, model),
        sampling=sampling,
        stream=bool(fields.stream),
        include_usage=fields.stream_options is not None and bool(fields.stream_options.include_usage),
        echo=echo,
        drop_output=drop_output,
        return_token_ids=bool(fields.return_token_ids),
        priority=fields.priority or 0,
        cache_salt=fields.cache_salt or "",
        deadline_s=fields_deadline_s(fields),
        user=user_of(fields),
    )


def _prompts(prompt: str | list[Any], model: ServedModel) -> list[Prompt]:
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if not prompt:
        raise QuireError("invalid_value", "prompt is an empty list", "prompt")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise QuireError("invalid_type", "prompt mixes text and token ids in one list", "prompt")
    if kinds == {int}:
        return [_tokens(prompt, "prompt", model)]
    if len(prompt) > model.max_prompts:
        text = f"prompt has {len(prompt)} prompts; at most {model.max_prompts} in one request"
        raise QuireError("invalid_value", text, "prompt")
    if kinds == {str}:
        return [TextPrompt(text) for text in prompt]
    return [_tokens(ids, f"prompt[{index}]", model) for index, ids in enumerate(prompt)]


def _tokens(ids: list[int], param: str, model: ServedModel) -> TokensPrompt:
    check_token_ids(ids, param, model)
    return TokensPrompt(ids)


def check_token_ids(ids: list[int], param: str, model: ServedModel) -> None:
    """Refuse an empty list and ids outside of the vocabulary."""
    if not ids:
        raise QuireError("invalid_value", f"{param} is an empty list of token ids", param)
    if min(ids) < 0 or max(ids) >= model.limits.vocab_size:
        text = f"{param} holds an id outside of the vocabulary; ids are 0 to {model.limits.vocab_size - 1}"
        raise QuireError("invalid_value", text, param)
