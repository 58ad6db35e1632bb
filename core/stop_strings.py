"""StopStrings: finds stop strings in text that arrives in pieces, and holds back only what could still become one."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence


@functools.lru_cache(maxsize=256)
def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the longest shorter prefix that it ends with (Knuth, Morris, Pratt 1977).

    With it a scan costs the text's length, whatever the text and the stop string are. The choices of a request share
    the table.
    """
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table


@functools.lru_cache(maxsize=256)
def _beginnings(stops: tuple[str, ...]) -> re.Pattern[str]:
    """Finds a character that begins a stop string."""
    return re.compile("[" + re.escape("".join(sorted({stop[0] for stop in stops}))) + "]")


class StopStrings:
    """One choice's scanner. Text that `push` and `flush` return is final: it contains no stop string.

    Of several stop strings the one that is complete first wins, the longest of those that end together: the answer
    does not depend on how the text was cut into pieces.

    include: the stop string itself is part of the text (include_stop_str_in_output).
    """

    __slots__ = ("_begins", "_held", "_include", "_matched", "_stops", "hit")

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._begins = _beginnings(self._stops).search if self._stops else None
        self._matched = [0] * len(self._stops)  # how much of each stop string the text so far ends with
        self._held = ""  # the longest of these
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece; returns what can be shown. After a hit nothing more is shown."""
        if self.hit is not None:
            return ""
        if not self._held and (self._begins is None or self._begins(text) is None):
            return text  # the common case: nothing is under way and nothing begins here
        matched = self._matched
        ends = [
            (end, -len(stop), stop)
            for i, stop in enumerate(self._stops)
            if (matched[i] or stop[0] in text) and (end := self._scan(i, stop, text))
        ]
        buffer = self._held + text
        if ends:
            end, _, self.hit = min(ends)
            end += len(self._held)
            self._held = ""
            return buffer[: end if self._include else end - len(self.hit)]
        shown = len(buffer) - max(matched)
        self._held = buffer[shown:]
        return buffer[:shown]

    def flush(self) -> str:
        """The sequence is over: what was held back was no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _scan(self, index: int, stop: str, text: str) -> int:
        """Where in `text` a stop string is complete (the position behind it), or 0; notes how much of it is matched."""
        matched = self._matched[index]
        at = 0
        if not matched:
            at = text.find(stop[0])
            if at < 0:
                return 0
        fallbacks = _fallbacks(stop)
        size = len(text)
        while at < size:
            character = text[at]
            while matched and stop[matched] != character:
                matched = fallbacks[matched - 1]
            at += 1
            if stop[matched] == character:
                matched += 1
                if matched == len(stop):
                    return at
            else:
                at = text.find(stop[0], at)
                if at < 0:
                    break
        self._matched[index] = matched
        return 0
