"""Drain: when a refused client should come back."""

from __future__ import annotations

import pytest

from core.drain import LEAST_S, MOST_S, TIME_CONSTANT_S, Drain


def run(drain: Drain, begin_s: float, seconds: float, requests_per_s: float, tokens_per_s: float) -> None:
    for step in range(int(seconds * 10) + 1):
        at = step / 10
        drain.observe(begin_s + at, round(requests_per_s * at), round(tokens_per_s * at), True)


def test_nothing_is_known_at_first() -> None:
    drain = Drain()
    assert drain.seconds(1000, 10**6) == LEAST_S
    drain.observe(0.0, 0, 0, True)
    drain.observe(0.1, 0, 0, True)
    assert drain.seconds(1000, 10**6) == LEAST_S


@pytest.mark.parametrize("seconds", [1.0, 5.0, 60.0])
def test_a_steady_rate_is_found_soon(seconds: float) -> None:
    drain = Drain()
    run(drain, 100.0, seconds, 20, 4000)
    assert drain.seconds(100, 0) == pytest.approx(5.0, rel=0.06)
    assert drain.seconds(100, 80_000) == pytest.approx(20.0, rel=0.06)  # the slower of the two


def test_bounds() -> None:
    drain = Drain()
    run(drain, 0.0, 10, 20, 4000)
    assert drain.seconds(0, 0) == LEAST_S
    assert drain.seconds(10**6, 0) == MOST_S
    stuck = Drain()
    run(stuck, 0.0, 10, 0, 0)
    assert stuck.seconds(1, 0) == MOST_S


def test_the_past_fades() -> None:
    drain = Drain()
    run(drain, 0.0, 100, 100, 100)
    for step in range(1, 10 * int(4 * TIME_CONSTANT_S)):
        drain.observe(100 + step / 10, 10_000 + step, 10_000 + step, True)  # ten a second from now on
    assert drain.seconds(100, 0) == pytest.approx(10.0, rel=0.25)


def test_time_without_a_queue_does_not_count() -> None:
    drain = Drain()
    run(drain, 0.0, 10, 50, 50)
    drain.observe(10.05, 500, 500, False)
    drain.observe(5000.0, 600, 600, True)
    assert drain.seconds(100, 0) == pytest.approx(2.0, rel=0.1)
