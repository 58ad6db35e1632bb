"""Cost: what tokens cost on rented GPUs, and from which volume on that is less than an API's price."""

from __future__ import annotations

import msgspec

from tools.plan.limit import Load

SECONDS_PER_DAY = 86400


class Prices(msgspec.Struct, frozen=True):
    """In one currency. api_*: per million tokens, None when there is nothing to compare with."""

    gpu_per_hour: float
    api_output: float | None = None
    api_prompt: float | None = None


class Cost(msgspec.Struct, frozen=True):
    """Of one plan at its expected rate, in the prices' currency; volumes count prompt and output tokens together."""

    per_hour: float
    """All GPUs together."""
    per_million_output_tokens: float
    """The whole rent divided by output tokens, at full load."""
    per_million_tokens: float
    """The same, divided by prompt and output tokens."""
    most_tokens_per_day: float
    """At full load all day."""
    api_per_million_tokens: float | None = None
    """The API's price of this mix of prompt and output."""
    break_even_tokens_per_day: float | None = None
    """From this volume on a GPU rented all day costs less than the API; None without an API price, or if it never does
    within most_tokens_per_day."""
    break_even_requests_per_day: float | None = None


def cost_of(prices: Prices, gpus: int, tokens_per_s: float, load: Load) -> Cost:
    """tokens_per_s: expected output tokens."""
    per_hour = prices.gpu_per_hour * gpus
    whole = tokens_per_s * load.total_tokens / load.output_tokens
    capacity = whole * SECONDS_PER_DAY
    api = break_even = None
    if prices.api_output is not None:
        prompt = prices.api_output if prices.api_prompt is None else prices.api_prompt
        api = (prompt * load.prompt_tokens + prices.api_output * load.output_tokens) / load.total_tokens
        volume = per_hour * 24 / api * 1e6
        break_even = volume if volume <= capacity else None
    return Cost(
        per_hour=per_hour,
        per_million_output_tokens=per_hour / 3600 / tokens_per_s * 1e6,
        per_million_tokens=per_hour / 3600 / whole * 1e6,
        most_tokens_per_day=capacity,
        api_per_million_tokens=api,
        break_even_tokens_per_day=break_even,
        break_even_requests_per_day=None if break_even is None else break_even / load.total_tokens,
    )
