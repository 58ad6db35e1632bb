"""How many tokens a request took, as OpenAI counts them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from core.messages import Finished


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(endings: Iterable[Finished], *, drop_output: bool = False) -> Usage:
    """The sum over a call's requests; n choices share one prompt, which counts once."""
    prompt = completion = cached = 0
    for ending in endings:
        prompt += ending.prompt_tokens
        completion += 0 if drop_output else ending.completion_tokens
        cached += ending.cached_tokens
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
