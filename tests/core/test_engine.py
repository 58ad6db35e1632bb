"""core.engine: what is sent to whom; the loop itself is tested with real processes in tests/e2e."""

from __future__ import annotations

from typing import Any, cast

from core.engine import Engine, Tokenizers
from core.messages import SequenceOutput


class Sent:
    """A Server that only remembers."""

    def __init__(self) -> None:
        self.frames: list[tuple[str, list[Any]]] = []

    def send(self, peer: str, messages: list[Any]) -> None:
        self.frames.append((peer, messages))


class NothingLeft:
    """A Scheduler whose requests have all ended."""

    def has(self, request_id: str) -> bool:
        return False


def test_two_steps_at_once_of_which_both_end_a_choice() -> None:
    """By the time that the first step is published, the scheduler knows that the second one ended the request."""
    sent = Sent()
    tokenizers = Tokenizers(cast(Any, sent), "engine")
    tokenizers.owner["r"] = "tokenizer-0"
    engine = Engine(cast(Any, None), tokenizers, cast(Any, None))
    engine.scheduler = cast(Any, NothingLeft())
    steps: list[Any] = [(step, [SequenceOutput("r", step, 5, [7], finish_reason="length")], {}) for step in range(2)]
    engine.publish(steps)
    assert [(peer, frame[0].step, frame[0].outputs[0].choice) for peer, frame in sent.frames] == [
        ("tokenizer-0", 0, 0),
        ("tokenizer-0", 1, 1),
    ]
    assert tokenizers.owner == {}
