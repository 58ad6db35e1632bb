"""Arrivals: requests that wait for the tokenizer, in fair order. Pure.

One client may send thousands of prompts in a moment, and a prompt of many megabytes: the others' are encoded between
its own.
"""

from __future__ import annotations

from core.fair_queue import FairQueue, Place
from core.messages import ChatPrompt, Generate, TextPrompt, TokensPrompt


class Arrival:
    """A request that waits. `text`: what is to be encoded, once it is known. `special_tokens`: whether to add them."""

    __slots__ = ("generate", "peer", "special_tokens", "text")

    def __init__(self, peer: str, generate: Generate, text: str | None = None, special_tokens: bool = False) -> None:
        self.peer = peer
        self.generate = generate
        self.text = text
        self.special_tokens = special_tokens

    @property
    def size(self) -> int:
        """What it costs to tokenize, roughly in characters; at least 1."""
        if self.text is not None:
            return 1 + len(self.text)
        match self.generate.prompt:
            case TextPrompt(text):
                return 1 + len(text)
            case ChatPrompt(messages):
                return 1 + len(messages)
            case TokensPrompt(ids):
                return 1 + len(ids)


class Arrivals:
    """What waits, by id and in order."""

    def __init__(self) -> None:
        self._by_id: dict[str, Arrival] = {}
        self._queue: FairQueue[Arrival] = FairQueue()

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._by_id

    def sent_by(self, peer: str) -> list[str]:
        """The ids of what an api process has sent."""
        return [request_id for request_id, arrival in self._by_id.items() if arrival.peer == peer]

    def add(self, arrival: Arrival) -> None:
        """Let a request wait; no other of its id may."""
        generate = arrival.generate
        self._by_id[generate.request_id] = arrival
        self._queue.push(arrival, Place(generate.tenant, generate.user, generate.priority, arrival.size))

    def take(self) -> Arrival | None:
        """The request whose turn it is; None when nothing waits."""
        arrival = self._queue.first()
        if arrival is not None:
            self._queue.remove(arrival, arrival.size)
            del self._by_id[arrival.generate.request_id]
        return arrival

    def discard(self, request_id: str) -> Arrival | None:
        """Take a request out, whose turn has not come; returns it if it was here."""
        arrival = self._by_id.pop(request_id, None)
        if arrival is not None:
            self._queue.remove(arrival)
        return arrival
