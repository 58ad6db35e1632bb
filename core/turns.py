"""Turns: who is next among those who wait, so that each gets an even share of the tokens. Pure: no clock but its own.

This is fair queueing by virtual time. It gives the shares of a deficit round robin, but no round is walked through: a
turn costs O(log waiting) however large it is, and a large share comes in single requests, not in bursts of a quantum.
Each name has a mark, the tokens up to which it has been served; the lowest mark is next. A newcomer's mark is where
everybody's stands on average, so nobody saves up turns by being away, and an endless row of newcomers holds up nobody.
"""

from __future__ import annotations

import heapq

MAX_REMEMBERED = 1024  # names that are away with more than their share; the one with the least of it is forgotten

Entry = tuple[float, bool, int, str]  # mark, whether it was served before (newcomers win ties), number, name


class Turns:
    """Names that wait, and what those that do not wait any more had too much."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED) -> None:
        self._max_remembered = max_remembered
        self._average = 0.0
        self._number = 0
        self._entries: dict[str, Entry] = {}
        self._heap: list[Entry] = []  # an entry that is not its name's any more is skipped when met
        self._dues: dict[str, float] = {}  # settled with a name's next turn
        self._away: dict[str, float] = {}  # name -> mark
        self._away_heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_remembered(self) -> int:
        """Names that are away and not forgotten."""
        return len(self._away)

    def enter(self, name: str) -> None:
        """A name begins to wait."""
        self._put(name, max(self._average, self._away.pop(name, 0.0)), False)

    def first(self) -> str:
        """Whose turn it is. Raises IndexError when nobody waits."""
        heap = self._heap
        while self._entries.get(heap[0][3]) is not heap[0]:
            heapq.heappop(heap)
        return heap[0][3]

    def charge(self, name: str, tokens: float) -> None:
        """A name that waits was served, and goes on waiting."""
        mark = self._entries[name][0]
        owed = tokens + self._dues.pop(name, 0.0)
        if owed < 0:  # a mark never goes back: the rest of a refund is for the turns after this one
            self._dues[name], owed = owed, 0.0
        self._average = max(mark, self._average + owed / len(self._entries))
        self._put(name, mark + owed, True)

    def settle(self, name: str, tokens: float) -> None:
        """What a name was charged proved too little (or, negative, too much). Nothing for a name that is forgotten."""
        if name in self._entries:
            self._dues[name] = self._dues.get(name, 0.0) + tokens
        elif name in self._away:
            self._remember(name, self._away[name] + tokens)

    def leave(self, name: str) -> None:
        """A name waits no more."""
        mark = self._entries.pop(name)[0] + self._dues.pop(name, 0.0)
        if not self._entries:  # everybody had what they wanted: all start anew
            self._average = 0.0
            self._heap.clear()
            self._away.clear()
            self._away_heap.clear()
            return
        self._remember(name, mark)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def _put(self, name: str, mark: float, again: bool) -> None:
        self._number += 1
        entry = self._entries[name] = (mark, again, self._number, name)
        heapq.heappush(self._heap, entry)

    def _remember(self, name: str, mark: float) -> None:
        self._away[name] = mark
        heapq.heappush(self._away_heap, (mark, name))
        heap = self._away_heap
        while heap and (heap[0][0] <= self._average or len(heap) > self._max_remembered):
            least, forgotten = heapq.heappop(heap)
            if self._away.get(forgotten) == least:
                del self._away[forgotten]
