"""Report: a measurement's figures from its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tools.bench.client import Answer


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 by linear interpolation between order statistics; None of nothing."""
    ordered = sorted(values)
    return {f"p{share}": _quantile(ordered, share / 100) for share in (50, 90, 99)}


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def steady(answers: Sequence[Answer], concurrency: int) -> list[Answer]:
    """Without the first and the last wave: what began with a full house, and ended with one."""
    ordered = sorted(answers, key=lambda answer: answer.began_s)
    return ordered[concurrency:-concurrency] if len(ordered) > 2 * concurrency else ordered


def report(answers: Sequence[Answer], concurrency: int, began_s: float, ended_s: float) -> dict[str, Any]:
    """Throughput over the time in which the house was full; latencies of the steady state; errors of all."""
    good = [answer for answer in answers if not answer.error and answer.events]
    window = steady(good, concurrency)
    first = min((answer.began_s for answer in window), default=began_s)
    last = max((answer.began_s for answer in window), default=ended_s)
    if len(good) <= 2 * concurrency or last <= first:
        first, last = began_s, ended_s
    # Tokens by the time at which their chunk came; a chunk of several tokens counts its share of the request's.
    tokens = sum(
        answer.output_tokens * sum(first <= at < last for at in answer.events) / len(answer.events) for answer in good
    )
    seconds = max(last - first, 1e-9)
    gaps = [b - a for answer in window for a, b in zip(answer.events, answer.events[1:], strict=False)]
    return {
        "num_ok": len(good),
        "num_sent": len(answers),
        "errors": dict(Counter(answer.error or "no output" for answer in answers if answer not in good)),
        "seconds": seconds,
        "output_tokens_per_s": tokens / seconds,
        "prompt_tokens_per_s": sum(a.prompt_tokens for a in window if first <= a.began_s < last) / seconds,
        "requests_per_s": sum(first <= answer.ended_s < last for answer in good) / seconds,
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "ttft_s": percentiles([answer.ttft_s for answer in window]),
        "tpot_s": percentiles([answer.tpot_s for answer in window if answer.output_tokens > 1]),
        "inter_token_s": percentiles(gaps),
        "end_to_end_s": percentiles([answer.ended_s - answer.began_s for answer in window]),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "--:|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
