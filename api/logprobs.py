"""Log-probabilities as the two OpenAI families write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from api.schema.chat import ChatLogprob, ChatLogprobs, TopLogprob
from api.schema.completions import CompletionLogprobs
from core.messages import TokenText

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot write


def chat_logprobs(tokens: Iterable[TokenText]) -> ChatLogprobs:
    """The `logprobs` of a chat choice, or of one of its chunks."""
    return ChatLogprobs(
        [
            ChatLogprob(
                token.text,
                _finite(token.logprob),
                list(token.raw),
                [TopLogprob(text, _finite(logprob), list(raw)) for _, text, raw, logprob in token.top],
            )
            for token in tokens
        ]
    )


def completion_logprobs(
    tokens: Sequence[TokenText | None], *, count: int, offset: int, first_text: str = ""
) -> CompletionLogprobs:
    """The `logprobs` of a completions choice, or of one of its chunks.

    Args:
        tokens: None only for the first token of an echoed prompt, whose text is `first_text`.
        count: alternatives per token; 0 gives `top_logprobs: null`.
        offset: where in the choice's text the first token begins, in characters.
    """
    texts = [first_text if token is None else token.text for token in tokens]
    offsets: list[int] = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops: list[dict[str, float] | None] | None = None
    if count:
        tops = [None if token is None else _top_map(token) for token in tokens]
    chosen = [None if token is None else _finite(token.logprob) for token in tokens]
    return CompletionLogprobs(texts, chosen, tops, offsets)


def prompt_logprobs(tokens: Sequence[TokenText | None]) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` extra: per position a map from token id to log-probability, rank and text."""
    result: list[dict[str, Any] | None] = []
    for token in tokens:
        if token is None:
            result.append(None)
            continue
        entries = {
            str(token_id): {"logprob": _finite(logprob), "rank": place + 1, "decoded_token": text}
            for place, (token_id, text, _, logprob) in enumerate(token.top)
        }
        entries[str(token.token_id)] = {
            "logprob": _finite(token.logprob),
            "rank": token.rank + 1,
            "decoded_token": token.text,
        }
        result.append(entries)
    return result


def _top_map(token: TokenText) -> dict[str, float]:
    """The alternatives by text, and the chosen token in any case, as OpenAI has it."""
    found = {text: _finite(logprob) for _, text, _, logprob in token.top}
    found.setdefault(token.text, _finite(token.logprob))
    return found


def _finite(logprob: float) -> float:
    return logprob if logprob >= LOWEST else LOWEST  # also for NaN
