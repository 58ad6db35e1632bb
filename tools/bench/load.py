"""Load: what one measurement sends, request by request."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from core.errors import QuireError
from tools.bench.exact_text import ExactText

_FIRST_ID = 5  # below lie the special tokens of most vocabularies


@dataclass(frozen=True)
class Load:
    """One measurement. Everything in it follows from `seed`, so that two servers can be sent the same.

    Prompts are random token ids of exact length; with `tokenizer` (a tokenizer.json) random words of exact length,
    which chat needs. Random: nothing is in a prefix cache by chance.

    Args:
        num_requests: of all conversations and turns.
        concurrency: requests in flight (closed loop), over all clients.
        output_spread: output lengths are uniform in output_tokens * (1 ± spread).
        rate: requests per second (Poisson arrivals) instead of the closed loop, when not None.
        shared_prefix: leading tokens that all prompts of a prefix group have in common.
        turns: turns of each conversation (chat only): turn t is sent when t - 1 is answered, with the whole history
            and a new message of `prompt_tokens`.
        overhead: tokens that the server adds to each prompt (chat template, BOS); taken off prompt_tokens.
        clients: processes that send.
        stream: answers come as events; else as a whole, with no times of their tokens.
    """

    url: str
    model: str
    num_requests: int
    concurrency: int
    prompt_tokens: int = 512
    output_tokens: int = 256
    output_spread: float = 0.0
    vocab_size: int = 4096
    rate: float | None = None
    shared_prefix: int = 0
    prefix_groups: int = 1
    turns: int = 1
    temperature: float = 0.0
    seed: int = 0
    key: str | None = None
    clients: int = 1
    chat: bool = False
    tokenizer: str | None = None
    overhead: int = 0
    timeout_s: float = 600.0
    stream: bool = True

    def __post_init__(self) -> None:
        if self.chat and self.tokenizer is None:
            raise QuireError("invalid_config", "--chat: messages are text, so give --tokenizer too", "tokenizer")
        if self.turns > 1 and not self.chat:
            raise QuireError("invalid_config", "--turns: answers come back as text, so give --chat too", "turns")
        if self.num_requests % self.turns:
            raise QuireError("invalid_config", f"--requests: must be a multiple of --turns {self.turns}", "requests")
        if not 0 <= self.shared_prefix < self.prompt_tokens - self.overhead:
            raise QuireError(
                "invalid_config",
                f"--prompt-tokens: {self.prompt_tokens} must exceed --shared-prefix {self.shared_prefix} and the "
                f"{self.overhead} tokens that the server adds",
                "prompt_tokens",
            )

    @property
    def path(self) -> str:
        """The door that is sent to."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def conversations(self) -> int:
        return self.num_requests // self.turns

    def prompt(self, index: int) -> list[int] | str:
        """Token ids or text of request `index` (in a conversation: its new message)."""
        conversation, turn = divmod(index, self.turns)
        shared = random.Random(f"{self.seed} prefix {conversation % self.prefix_groups}")
        own = random.Random(f"{self.seed} {index}")
        num_shared = self.shared_prefix if turn == 0 else 0
        num_own = self.prompt_tokens - self.overhead - num_shared
        if self.tokenizer is None:
            ids = range(_FIRST_ID, self.vocab_size)
            return shared.choices(ids, k=num_shared) + own.choices(ids, k=num_own)
        text = ExactText.load(self.tokenizer)
        parts = [text.draw(rng, count) for rng, count in ((shared, num_shared), (own, num_own)) if count]
        return " ".join(parts)

    def max_tokens(self, index: int) -> int:
        """The exact output length of request `index`."""
        spread = random.Random(f"{self.seed} length {index}").uniform(-self.output_spread, self.output_spread)
        return max(1, round(self.output_tokens * (1 + spread)))

    def body(self, index: int, history: list[dict[str, str]] | None = None) -> bytes:
        """The JSON of request `index`; `history`: the messages before it."""
        prompt = self.prompt(index)
        asked: dict[str, Any] = {"prompt": prompt}
        if self.chat:
            asked = {"messages": [*(history or []), {"role": "user", "content": prompt}]}
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(
            {
                "model": self.model,
                **asked,
                "max_tokens": self.max_tokens(index),
                "temperature": self.temperature,
                "ignore_eos": True,
            }
        ).encode()
