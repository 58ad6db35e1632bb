"""Deadlines: when requests must have ended. Pure: the time comes in."""

from __future__ import annotations

import heapq
from collections.abc import Container, Sized
from typing import Protocol


class Known(Container[str], Sized, Protocol):
    """The ids of the requests that are under way."""


class Deadlines:
    """A heap of times. A request that ends is not taken out: `known` says what is still under way.

    Times are CLOCK_MONOTONIC, which all processes of the machine share and which nobody sets.
    """

    def __init__(self, known: Known) -> None:
        self._known = known
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request_id: str, deadline_s: float | None) -> None:
        """Watch a request; None: it has no deadline."""
        if deadline_s is None:
            return
        heapq.heappush(self._heap, (deadline_s, request_id))
        if len(self._heap) > 2 * len(self._known) + 1024:
            self._heap = [entry for entry in self._heap if entry[1] in self._known]
            heapq.heapify(self._heap)

    def wait_s(self, now: float, most: float) -> float:
        """Seconds until the next deadline, at most `most`."""
        return min(most, max(0.0, self._heap[0][0] - now)) if self._heap else most

    def expired(self, now: float) -> list[str]:
        """The requests whose deadline has passed, each once."""
        found: list[str] = []
        while self._heap and self._heap[0][0] <= now:
            _, request_id = heapq.heappop(self._heap)
            if request_id in self._known:
                found.append(request_id)
        return list(dict.fromkeys(found))
