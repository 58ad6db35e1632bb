"""StopStrings: finds stop strings in text that arrives in pieces, and holds back only what could still become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One choice's scanner. Text that `push` and `flush` return is final: it contains no stop string.

    include: the stop string itself is part of the text (include_stop_str_in_output).
    """

    __slots__ = ("_held", "_include", "_longest", "_prefixes", "_stops", "hit")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._include = include
        self._held = ""
        # Every proper prefix of a stop: text that ends with one of them must wait.
        self._prefixes = {stop[:end] for stop in self._stops for end in range(1, len(stop))}
        self._longest = max(map(len, self._prefixes), default=0)
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece; returns what can be shown. After a hit nothing more is shown."""
        if self.hit is not None:
            return ""
        buffer = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = buffer.find(stop)
            if at >= 0 and (best is None or (at + len(stop), at) < best[:2]):
                best = (at + len(stop), at, stop)
        if best is not None:
            end, at, self.hit = best
            self._held = ""
            return buffer[: end if self._include else at]
        keep = self._longest_prefix_at_end(buffer)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """The sequence is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _longest_prefix_at_end(self, buffer: str) -> int:
        for length in range(min(self._longest, len(buffer)), 0, -1):
            if buffer[-length:] in self._prefixes:
                return length
        return 0
