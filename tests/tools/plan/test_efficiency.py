"""The fit: it finds what was put in, stays physical, and is honest on the loads it has not seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.plan import efficiency as module
from tools.plan.efficiency import Efficiency, Measured, summary
from tools.plan.gpus import Catalogue


@pytest.fixture(scope="module")
def measured() -> Measured:
    return Measured.read(Catalogue.read())


def test_both_halves_have_loads_of_every_model_and_size(measured: Measured) -> None:
    for half in (True, False):
        points = measured.half(half)
        assert {point.load.concurrency for point in points} >= ({16, 64, 256} if half else {1, 8, 64})
        assert len({point.name for point in points}) == 3


def test_errors_on_the_half_that_was_not_fitted(measured: Measured) -> None:
    """Bounds are what today's fit reaches, with a little room: a worse model of the step must not pass unseen."""
    found = Efficiency.fit(measured.half(True))
    rates, firsts = summary(found.step_errors(measured.half(False))), summary(found.ttft_errors(measured.half(False)))
    assert rates.mean < 0.05
    assert rates.largest < 0.10
    assert firsts.mean < 0.65  # three loads were measured before prompts were spread over steps


def test_the_other_half_gives_a_similar_fit(measured: Measured) -> None:
    one, other = Efficiency.fit(measured.half(True)), Efficiency.fit(measured.half(False))
    assert one.layer_s == pytest.approx(other.layer_s, rel=0.3)
    assert summary(other.step_errors(measured.half(True))).mean < 0.12


def test_a_fit_finds_what_was_put_in(measured: Measured) -> None:
    true = Efficiency(kv=1.4, prompt=2.0, layer_s=30e-6, alone=1.1, burst=0.5)
    made = [
        replace(
            point,
            step_s=true.step_s(point.limit, point.load, point.layers),
            ttft_s=true.ttft_s(point.limit, point.load, point.layers),
        )
        for point in measured.points
    ]
    found = Efficiency.fit(made)
    assert (found.kv, found.prompt, found.alone, found.burst) == pytest.approx((1.4, 2.0, 1.1, 0.5), rel=1e-6)
    assert found.layer_s == pytest.approx(30e-6, rel=1e-6)


def test_nothing_is_faster_than_its_limit(measured: Measured) -> None:
    """Steps that seem to read the cache at twice its rate are put down to something else."""
    made = [replace(point, step_s=point.limit.step - point.limit.kv / 2) for point in measured.points]
    found = Efficiency.fit(made)
    assert found.kv == 1.0
    assert found.prompt >= 1.0
    assert found.layer_s >= 0.0


def test_ranks_pay_for_their_collectives(measured: Measured) -> None:
    found = Efficiency.fit(measured.half(True))
    point = measured.points[0]
    alone = found.step_s(point.limit, point.load, 32)
    assert found.step_s(point.limit, point.load, 32, 2) == pytest.approx(alone + 66 * module.COLLECTIVE_S)


def test_the_script_prints_both_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main() == 0
    out = capsys.readouterr().out
    assert "fitted  : tokens/s" in out
    assert "held out: tokens/s" in out
