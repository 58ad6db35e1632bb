"""Report: a measurement's figures from its answers, and their Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tools.bench.client import Answer
from tools.bench.load import Load
from tools.bench.sender import Sent

HEADER = [
    "C",
    "tokens/s",
    "requests/s",
    "TTFT p50 / p99 ms",
    "TPOT p50 / p99 ms",
    "inter-token p50 / p99 ms",
    "end-to-end p50 / p99 s",
    "N",
    "errors",
]
CLIENT_LIMIT = 0.9  # CPU share of a client process from which on it may be what limits


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


def edge(load: Load) -> int:
    """Requests in a wave. At a fixed rate there are no waves: a tenth of the requests at either end."""
    return load.concurrency if load.rate is None else max(1, load.num_requests // 10)


def steady(answers: Sequence[Answer], wave: int) -> list[Answer]:
    """Without the first and the last wave: what began into a full house, and ended in one. All, if there is no more."""
    ordered = sorted(answers, key=lambda answer: answer.began_s)
    return ordered[wave:-wave] if len(ordered) > 2 * wave else ordered


def _full_house(answers: Sequence[Answer], wave: int) -> tuple[float, float]:
    """When the last of the first wave ended, and the last wave began; (0, 0) with less than three waves."""
    if len(answers) <= 2 * wave:
        return 0.0, 0.0
    ordered = sorted(answers, key=lambda answer: answer.began_s)
    ends = sorted(answer.ended_s for answer in answers)
    return max(answer.ended_s for answer in ordered[:wave]), ends[-wave - 1]


def report(load: Load, sent: Sent) -> dict[str, Any]:
    """Throughput over the time in which the house was full; latencies of the steady state; errors of all.

    That time begins when every request of the first wave has ended (one that is held up in the rush is of it too), and
    ends where the last wave begins: in a closed loop that is the ending `wave` before the last.
    """
    wave = edge(load)
    good = [answer for answer in sent.answers if not answer.error and answer.events]
    first, last = _full_house(good, wave)
    full = first < last
    if not full:
        first, last = sent.began_s, sent.ended_s
    # Tokens by the time at which their chunk came; a chunk of several tokens counts its share of the request's.
    tokens = sum(a.output_tokens * sum(first < at <= last for at in a.events) / len(a.events) for a in good)
    seconds = max(last - first, 1e-9)
    window = steady(good, wave)
    gaps = [b - a for answer in window for a, b in zip(answer.events, answer.events[1:], strict=False)]
    return {
        "concurrency": load.concurrency if load.rate is None else None,
        "rate": load.rate,
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "num_sent": len(sent.answers),
        "num_ok": len(good),
        "steady": full,
        "errors": dict(Counter(a.error or "no output" for a in sent.answers if a.error or not a.events)),
        "wrong_lengths": sum(_wrong_length(load, answer) for answer in good),
        "without_usage": sum(answer.counted for answer in good),
        "seconds": seconds,
        "output_tokens_per_s": tokens / seconds,
        "requests_per_s": sum(first < answer.ended_s <= last for answer in good) / seconds,
        "prompt_tokens_total": sum(answer.prompt_tokens for answer in good),
        "output_tokens_total": sum(answer.output_tokens for answer in good),
        "cached_tokens_total": sum(answer.cached_tokens for answer in good),
        "ttft_s": percentiles([answer.ttft_s for answer in window]),
        "tpot_s": percentiles([answer.tpot_s for answer in window if answer.output_tokens > 1]),
        "inter_token_s": percentiles(gaps),
        "end_to_end_s": percentiles([answer.ended_s - answer.began_s for answer in window]),
        "tokens_per_chunk": sum(a.output_tokens for a in good) / max(1, sum(len(a.events) for a in good)),
        "client_shares": sent.client_shares,
    }


def _wrong_length(load: Load, answer: Answer) -> bool:
    """The server saw another prompt length, or gave another output length, than the load says."""
    if not answer.counted and answer.output_tokens != load.max_tokens(answer.index):
        return True
    # Later turns carry the answers before them, whose lengths as text are known to the server only.
    first_turn = answer.index % load.turns == 0
    return first_turn and answer.prompt_tokens not in (0, load.prompt_tokens)


def row(result: dict[str, Any]) -> list[str]:
    """The cells of a Markdown table row; see HEADER."""

    def both(key: str, scale: float = 1000.0, digits: int = 1) -> str:
        values = (result[key]["p50"], result[key]["p99"])
        return " / ".join("-" if value is None else f"{value * scale:,.{digits}f}" for value in values)

    arrival = f"{result['rate']:g}/s" if result["rate"] is not None else f"{result['concurrency']}"
    return [
        arrival,
        f"{result['output_tokens_per_s']:,.0f}",
        f"{result['requests_per_s']:,.2f}",
        both("ttft_s"),
        both("tpot_s"),
        both("inter_token_s"),
        both("end_to_end_s", 1.0, 2),
        f"{result['num_ok']}",
        ", ".join(f"{code}: {count}" for code, count in result["errors"].items()) or "0",
    ]


def notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the table must know to believe it; one sentence each."""
    found = []
    for result in results:
        name = row(result)[0]
        if not result["steady"]:
            found.append(f"{name}: too few requests for a steady state; the first and last wave are counted")
        if result["wrong_lengths"]:
            found.append(f"{name}: {result['wrong_lengths']} requests had other lengths than asked for")
        if result["without_usage"]:
            found.append(
                f"{name}: {result['without_usage']} answers without usage; their chunks were counted as tokens"
            )
        if max(result["client_shares"]) > CLIENT_LIMIT:
            found.append(
                f"{name}: a client process used {max(result['client_shares']):.0%} of a core, and may be what limits; "
                "give more --clients"
            )
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "--:|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
