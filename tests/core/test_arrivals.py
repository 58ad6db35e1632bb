"""Arrivals: by id and in turn; the process that uses them is tested in test_tokenizer.py."""

from __future__ import annotations

import pytest

from core.arrivals import Arrival, Arrivals
from core.messages import ChatPrompt, Generate, Prompt, TextPrompt, TokensPrompt
from quire import SamplingParams


def arrival(request_id: str, tenant: str = "", prompt: Prompt | None = None, peer: str = "api-0") -> Arrival:
    return Arrival(peer, Generate(request_id, "m@1", prompt or TextPrompt("hi"), SamplingParams(), tenant=tenant))


@pytest.mark.parametrize(
    ("prompt", "size"),
    [(TextPrompt(""), 1), (TextPrompt("abc"), 4), (ChatPrompt(b"[]"), 3), (TokensPrompt([1, 2, 3, 4]), 5)],
)
def test_size(prompt: Prompt, size: int) -> None:
    assert arrival("r", prompt=prompt).size == size


def test_the_size_of_a_rendered_text() -> None:
    assert Arrival("api-0", arrival("r").generate, "a long text").size == 12


def test_tenants_take_turns_by_size() -> None:
    arrivals = Arrivals()
    for number in range(4):
        arrivals.add(arrival(f"long{number}", "a", TextPrompt("x" * 1000)))
    for number in range(4):
        arrivals.add(arrival(f"short{number}", "b"))
    assert len(arrivals) == 8
    order = []
    while (taken := arrivals.take()) is not None:
        order.append(taken.generate.request_id)
    assert order == ["long0", *(f"short{number}" for number in range(4)), "long1", "long2", "long3"]
    assert len(arrivals) == 0


def test_discard_and_sender() -> None:
    arrivals = Arrivals()
    for number in range(3):
        arrivals.add(arrival(f"r{number}", peer=f"api-{number % 2}"))
    assert arrivals.sent_by("api-0") == ["r0", "r2"]
    assert "r0" in arrivals
    gone = arrivals.discard("r0")
    assert gone is not None
    assert gone.peer == "api-0"
    assert arrivals.discard("r0") is None
    assert "r0" not in arrivals
    arrivals.add(arrival("r0"))  # it may come again
    assert [taken.generate.request_id for taken in (arrivals.take(), arrivals.take()) if taken] == ["r1", "r2"]
