"""Admission: the bounds of what the server takes in at once, and which of them is reached. Pure.

The doors ask with what they last heard, before a prompt is tokenized; the scheduler asks with what is, and decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from core.config import Config


class Reached(NamedTuple):
    """A bound that is reached: its name among the options, and the sentence that a client is told.

    `excess_tokens`: by how many tokens, where it is the bound on tokens."""

    bound: str
    message: str
    excess_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What may wait, and what may be under way in all."""

    max_queued_requests: int
    max_queued_tokens: int
    max_concurrent_requests: int

    @staticmethod
    def of(config: Config) -> Bounds:
        """The bounds that the options describe."""
        concurrent = config.max_concurrent_requests or config.max_num_seqs + config.max_queued_requests
        return Bounds(config.max_queued_requests, config.max_queued_tokens, concurrent)

    def reached(self, waiting: int, waiting_tokens: int, requests: int, tokens: int = 1) -> Reached | None:
        """The bound that one more request of `tokens` prompt tokens would exceed.

        A prompt that is longer than the bound on tokens is taken while nothing else waits, or it could never run.
        """
        if requests >= self.max_concurrent_requests:
            return _reached("max_concurrent_requests", requests, "requests are under way", self.max_concurrent_requests)
        if waiting >= self.max_queued_requests:
            return _reached("max_queued_requests", waiting, "requests are waiting", self.max_queued_requests)
        excess = waiting_tokens + tokens - self.max_queued_tokens
        if waiting_tokens and excess > 0:
            found = _reached("max_queued_tokens", waiting_tokens, "prompt tokens are waiting", self.max_queued_tokens)
            return found._replace(excess_tokens=excess)
        return None


def _reached(bound: str, count: int, what: str, limit: int) -> Reached:
    option = "--" + bound.replace("_", "-")
    return Reached(bound, f"{count} {what} already ({option} is {limit}); try again later")
