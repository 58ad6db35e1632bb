"""Admission: which bound is reached, and how it is said."""

from __future__ import annotations

import pytest

from core.admission import Bounds
from core.config import Config

BOUNDS = Bounds(max_queued_requests=4, max_queued_tokens=100, max_concurrent_requests=10)


@pytest.mark.parametrize(
    ("state", "bound"),
    [
        ((3, 99, 9, 1), None),
        ((4, 0, 4, 1), "max_queued_requests"),
        ((3, 60, 3, 41), "max_queued_tokens"),
        ((3, 60, 3, 40), None),
        ((0, 0, 10, 1), "max_concurrent_requests"),
        ((0, 0, 3, 5000), None),  # it could never run otherwise
        ((1, 1, 3, 5000), "max_queued_tokens"),
    ],
)
def test_reached(state: tuple[int, int, int, int], bound: str | None) -> None:
    reached = BOUNDS.reached(*state)
    assert (reached and reached.bound) == bound


def test_the_message_names_the_option_and_its_value() -> None:
    reached = BOUNDS.reached(4, 0, 4)
    assert reached is not None
    assert reached.message == "4 requests are waiting already (--max-queued-requests is 4); try again later"


def test_the_bound_on_all_follows_from_the_others() -> None:
    assert Bounds.of(Config(max_num_seqs=8, max_queued_requests=32)).max_concurrent_requests == 40
    assert Bounds.of(Config(max_concurrent_requests=5)).max_concurrent_requests == 5
