"""StepTime: how long a step of the null device takes."""

from __future__ import annotations

import bisect

from core.errors import QuireError


class StepTime:
    """Seconds by tokens of a step: a table of points, linear in between, flat outside.

    Args:
        points: (tokens, seconds), at least one, tokens strictly increasing.
    """

    def __init__(self, points: list[tuple[int, float]]) -> None:
        self._tokens = [tokens for tokens, _ in points]
        self._seconds = [seconds for _, seconds in points]

    @staticmethod
    def parse(step_ms: float, table: str | None) -> StepTime:
        """From the options null_step_ms and null_step_table ('tokens:ms,…', which wins)."""
        if table is None:
            return StepTime([(0, step_ms / 1000)])
        try:
            pairs = [entry.split(":") for entry in table.split(",")]
            points = sorted((int(tokens), float(ms) / 1000) for tokens, ms in pairs)
        except ValueError:
            raise _invalid(table, "is not of the form 'tokens:ms,…'") from None
        if any(not 0 <= seconds < 3600 for _, seconds in points):
            raise _invalid(table, "has a time outside 0 … 3,600,000 ms")
        if len({tokens for tokens, _ in points}) < len(points):
            raise _invalid(table, "names a number of tokens twice")
        return StepTime(points)

    def seconds(self, tokens: int) -> float:
        """The time of a step of `tokens` tokens."""
        place = bisect.bisect_left(self._tokens, tokens)
        if place == 0:
            return self._seconds[0]
        if place == len(self._tokens):
            return self._seconds[-1]
        low, high = self._tokens[place - 1], self._tokens[place]
        share = (tokens - low) / (high - low)
        return self._seconds[place - 1] + share * (self._seconds[place] - self._seconds[place - 1])


def _invalid(table: str, what: str) -> QuireError:
    return QuireError("invalid_config", f"--null-step-table: {table!r} {what}; e.g. '1:3.5,256:8'", "null_step_table")
