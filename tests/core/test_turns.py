"""Turns: even shares, whoever comes and goes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.turns import Turns


def serve(turns: Turns, cost: float) -> str:
    name = turns.first()
    turns.charge(name, cost)
    return name


def test_nobody_waits() -> None:
    with pytest.raises(IndexError):
        Turns().first()


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=12), st.integers(50, 400))
def test_shares_are_even_within_one_turn_of_the_largest(costs: list[int], num_turns: int) -> None:
    """Names with costs of their own, all of them always waiting: served tokens differ by less than two turns."""
    turns = Turns()
    for index in range(len(costs)):
        turns.enter(f"t{index}")
    served = Counter({f"t{index}": 0 for index in range(len(costs))})
    for _ in range(num_turns):
        name = turns.first()
        cost = costs[int(name[1:])]
        turns.charge(name, cost)
        served[name] += cost
        assert max(served.values()) - min(served.values()) <= 2 * max(costs)


@given(st.integers(0, 10**9))
def test_everybody_who_waits_is_served_whoever_comes(seed: int) -> None:
    """A name waits; in each turn a new one comes, is served once and leaves. It gets its turn all the same."""
    rng = random.Random(seed)
    turns = Turns()
    turns.enter("old")
    turns.charge("old", rng.randint(1, 500))
    for number in range(3000):
        turns.enter(f"new{number}")
        name = serve(turns, rng.randint(1, 50))
        if name == "old":
            return
        turns.leave(name)
    raise AssertionError("it was never served")


def test_a_newcomer_is_served_before_the_next_turn_of_one_who_has_long_been_served() -> None:
    turns = Turns()
    turns.enter("noisy")
    for _ in range(10_000):
        serve(turns, 700)
    turns.enter("quiet")
    assert turns.first() == "quiet"


def test_being_away_saves_up_nothing_and_leaving_forgives_nothing() -> None:
    turns = Turns()
    turns.enter("a")
    turns.enter("b")
    for _ in range(100):  # b asks for nothing for a while
        turns.charge("a", 10)
    turns.leave("b")
    turns.enter("b")
    served = Counter(serve(turns, 10) for _ in range(100))
    assert 48 <= served["a"] <= 52
    turns.enter("c")
    turns.charge("c", 10_000)
    turns.leave("c")  # with a large part of somebody else's share
    turns.enter("c")
    assert "c" not in {serve(turns, 10) for _ in range(100)}


def test_what_proves_too_little_is_settled_with_the_next_turn() -> None:
    turns = Turns()
    for name in ("a", "b"):
        turns.enter(name)
    first = serve(turns, 10)
    turns.settle(first, 190)
    served = Counter(serve(turns, 10) for _ in range(60))
    assert 19 <= served[({"a", "b"} - {first}).pop()] - served[first] <= 21  # 190 tokens are 19 turns


def test_a_refund_is_worth_the_turns_that_it_pays_for() -> None:
    turns = Turns()
    for name in ("a", "b"):
        turns.enter(name)
    first = serve(turns, 100)
    turns.settle(first, -90)
    served = Counter(serve(turns, 10) for _ in range(40))
    assert 19 <= served[first] <= 21
    turns.settle(first, -100)  # ten turns for nothing
    served = Counter(serve(turns, 10) for _ in range(40))
    assert 24 <= served[first] <= 26


@given(st.integers(0, 10**9))
def test_what_is_remembered_is_bounded(seed: int) -> None:
    rng = random.Random(seed)
    turns = Turns(max_remembered=8)
    turns.enter("stays")
    for number in range(500):
        name = f"n{number}"
        turns.enter(name)
        turns.charge(name, rng.randint(100, 10_000))
        turns.leave(name)
        assert turns.num_remembered <= 8
    turns.leave("stays")
    assert turns.num_remembered == 0
    assert len(turns) == 0
