"""Policy: how much prefill rides in a step, and who gives way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.messages import Submit
from core.policy import MIN_CHUNK, QUEUE_STEPS, Demand, order, prefill_budget, victim
from core.request import Request, Sequence
from quire import SamplingParams


def sequence(priority: int, arrival: int, num_scheduled: int, choice: int = 0, tenant: str = "") -> Sequence:
    submit = Submit(f"r{arrival}", "engine", [], SamplingParams(max_tokens=10), tenant=tenant)
    request = Request(submit, [1, 2, 3], b"", 10, frozenset())
    made = Sequence(request, choice, [], order(priority, arrival, choice))
    made.num_scheduled = num_scheduled
    return made


def test_order_is_priority_then_arrival_then_choice() -> None:
    keys = [order(1, 0, 0), order(0, 9, 0), order(0, 2, 1), order(0, 2, 0), order(-1, 50, 3)]
    assert sorted(keys) == [(-1, 50, 3), (0, 2, 0), (0, 2, 1), (0, 9, 0), (1, 0, 0)]


def test_without_decodes_a_step_is_filled() -> None:
    assert prefill_budget(0, 10, 160, 2048) == 2048


def test_with_decodes_a_step_stays_at_the_ideal_size() -> None:
    assert prefill_budget(10, 50, 160, 2048) == 150


def test_a_backlog_widens_the_step() -> None:
    assert prefill_budget(10, 80_000, 160, 2048) == 80_000 // QUEUE_STEPS > 150
    assert prefill_budget(10, 10**6, 160, 2048) == 2038  # but never past the limit


def test_prompts_keep_step_with_what_is_generated() -> None:
    demand = Demand()
    assert demand.ratio == 0
    for _ in range(1000):
        demand.observe(512, 256)
    assert demand.ratio == pytest.approx(2)
    assert prefill_budget(100, 50, 160, 2048, demand.ratio) == 200
    for _ in range(1000):
        demand.observe(10, 200)  # another load: the means follow
    assert demand.ratio == pytest.approx(0.05, rel=0.01)


def test_padding_is_filled() -> None:
    assert prefill_budget(250, 5000, 160, 2048, 2.0, (1, 512, 768, 1024)) == 768 - 250
    assert prefill_budget(100, 5000, 160, 2048, 2.0, (1, 300, 768)) == 200  # a whole step: nothing to fill
    assert prefill_budget(100, 5000, 160, 2048, 3.0, (1, 300)) == 300  # beyond the sizes: as it is


def test_many_decodes_still_let_a_chunk_in() -> None:
    assert prefill_budget(200, 5, 160, 2048) == MIN_CHUNK


@given(st.integers(0, 300), st.integers(0, 10**7), st.integers(1, 1000), st.integers(1, 4096))
def test_a_step_never_exceeds_its_limit(decodes: int, backlog: int, ideal: int, limit: int) -> None:
    budget = prefill_budget(decodes, backlog, ideal, limit)
    assert budget >= 0
    assert decodes + budget <= max(limit, decodes)
    if limit - decodes >= MIN_CHUNK:
        assert budget >= MIN_CHUNK


def test_victim_is_the_least_important() -> None:
    urgent, normal, late = sequence(-5, 0, 10), sequence(0, 1, 10), sequence(7, 2, 9000)
    assert victim([urgent, late, normal]) is late  # however much it costs


def test_importance_protects_from_no_other_key() -> None:
    loud = [sequence(-1000, 5, 30, tenant="loud"), sequence(-1001, 6, 20, tenant="loud")]
    plain = [sequence(9, 1, 300, tenant="plain"), sequence(8, 2, 200, tenant="plain")]
    assert victim([*plain, *loud]) is loud[0]  # the less important one of the key with the cheapest
    assert victim([*plain, loud[0], sequence(0, 7, 10, tenant="plain")]) is plain[0]


def test_victim_is_the_cheapest_among_equals() -> None:
    long, short = sequence(0, 0, 900), sequence(0, 1, 30)
    assert victim([long, short]) is short
    assert victim([sequence(0, 5, 900), sequence(0, 4, 30)]).num_scheduled == 30


def test_victim_is_the_latest_of_the_cheapest() -> None:
    first, second, fork = sequence(0, 3, 30), sequence(0, 8, 30), sequence(0, 8, 30, choice=1)
    assert victim([second, first]) is second
    assert victim([second, fork, first]) is fork
