"""Drain: how fast the queue empties, from which a refused client learns when to come back. Pure: time comes in."""

from __future__ import annotations

import math

TIME_CONSTANT_S = 10.0  # what happened so long ago counts a third of what happens now
LEAST_S, MOST_S = 1.0, 60.0
KNOWN_AFTER_S = 0.5  # a rate over less time than this is no rate


class Drain:
    """Exponentially weighted means of requests and tokens per second that leave the queue to begin.

    Only time with something waiting counts: an idle server is not a slow one.
    """

    def __init__(self) -> None:
        self._requests = 0.0  # weighted sums; divided by _weight they are rates
        self._tokens = 0.0
        self._weight_s = 0.0
        self._last: tuple[float, int, int] | None = None

    def observe(self, now: float, requests: int, tokens: int, waiting: bool) -> None:
        """Note the totals of what has left so far, at `now`; `waiting`: whether something still waits."""
        if self._last is not None:
            then, requests_then, tokens_then = self._last
            share = math.exp((then - now) / TIME_CONSTANT_S)
            self._requests = self._requests * share + (requests - requests_then)
            self._tokens = self._tokens * share + (tokens - tokens_then)
            self._weight_s = self._weight_s * share + TIME_CONSTANT_S * (1 - share)
        self._last = (now, requests, tokens) if waiting else None

    def seconds(self, requests: int, tokens: int) -> float:
        """Until so much has left the queue; between 1 and 60. 1 while nothing is known, 60 when nothing leaves."""
        if self._weight_s < KNOWN_AFTER_S:
            return LEAST_S
        needed = 0.0
        for amount, left in ((requests, self._requests), (tokens, self._tokens)):
            if amount:
                needed = max(needed, amount * self._weight_s / left if left else MOST_S)
        return min(MOST_S, max(LEAST_S, needed))
