"""Deadlines: each once, in time, and only of what is still under way."""

from __future__ import annotations

from core.deadlines import Deadlines


def test_expired_once_and_in_order() -> None:
    known = {"a", "b", "c", "gone"}
    deadlines = Deadlines(known)
    for request_id, at in (("b", 2.0), ("a", 1.0), ("gone", 1.5), ("c", None), ("a", 1.0)):
        deadlines.add(request_id, at)
    known.discard("gone")
    assert deadlines.wait_s(0.25, 10.0) == 0.75
    assert deadlines.wait_s(0.25, 0.5) == 0.5
    assert deadlines.expired(0.999) == []
    assert deadlines.expired(1.0) == ["a"]
    assert deadlines.expired(9.0) == ["b"]
    assert deadlines.expired(9.0) == []
    assert deadlines.wait_s(9.0, 10.0) == 10.0


def test_requests_that_ended_early_are_not_kept_until_their_deadline() -> None:
    known: set[str] = set()
    deadlines = Deadlines(known)
    for number in range(20_000):
        known.add(f"r{number}")
        deadlines.add(f"r{number}", 86_400.0)
        known.discard(f"r{number - 3}")
    assert len(deadlines) < 2000
    assert set(deadlines.expired(90_000.0)) == known
