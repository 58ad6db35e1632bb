"""StepMeter: what it counts, and how long it says that a queue will take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from core import meter as module
from core.messages import Batch, BatchResult, Scheduled, SequenceOutput
from core.meter import WINDOW, StepMeter
from core.stats import EngineSnapshot


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands until `now` is set."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def ending(reason: str | None) -> SequenceOutput:
    return SequenceOutput("r", 0, 0, [1], finish_reason=reason)


def observe(meter: StepMeter, sent_s: float, *reasons: str | None) -> None:
    meter.sent(Batch("m@1", 1, [Scheduled(0, 0, 1, True)], sent_s=sent_s), 1, ())
    scheduler: Any = SimpleNamespace(requests={}, has=lambda request_id: False)
    meter.observe(BatchResult("m@1", 1, [], busy_s=0.25), [ending(reason) for reason in reasons], scheduler)


def test_steps_and_busy_time_add_up(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    observe(meter, 999.9, None, "stop")
    observe(meter, 998.0)
    assert (meter.steps, meter.busy_s, meter.step.count) == (2, 0.5, 2)
    assert meter.step.total == pytest.approx(2.1)


def test_drain_follows_the_rate_of_endings(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    assert meter.drain_s(500) == 1.0  # nothing is known yet
    for _ in range(11):
        observe(meter, clock.now, "stop", None)  # a sequence that goes on is no ending
        clock.now += 0.5
    clock.now -= 0.5  # 10 endings after the first, in 5 s
    assert meter.drain_s(40) == pytest.approx(20.0)
    assert meter.drain_s(0) == 1.0
    assert meter.drain_s(10_000) == 60.0


def test_drain_slows_down_when_nothing_ends(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    observe(meter, clock.now, "stop")
    clock.now += 1
    observe(meter, clock.now, "length")
    assert meter.drain_s(10) == pytest.approx(10.0)
    clock.now += 4
    assert meter.drain_s(10) == pytest.approx(50.0)


def test_only_the_last_endings_count(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    observe(meter, clock.now, *["stop"] * 10)
    clock.now += 10_000
    for _ in range(WINDOW):
        clock.now += 0.1
        observe(meter, clock.now, "stop")
    assert meter.drain_s(100) == pytest.approx(10.0, rel=0.01)


def test_snapshot_gathers_pools_and_counters() -> None:
    pools = [
        SimpleNamespace(num_blocks=100, num_free=70, num_cached=20),
        SimpleNamespace(num_blocks=50, num_free=50, num_cached=0),
    ]
    names = ("step_tokens", "prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "recomputed_tokens")
    counters = {name: number for number, name in enumerate((*names, "requests", "aborted"), start=1)}
    scheduler: Any = SimpleNamespace(
        groups=SimpleNamespace(pools=pools),
        counters=SimpleNamespace(**counters),
        running=[object()] * 3,
        num_waiting=4,
        waiting_by=lambda: {"rows": 4},
    )
    meter = StepMeter()
    meter.worker_restarts = 2
    snapshot = meter.snapshot(cast("Any", scheduler))
    assert isinstance(snapshot, EngineSnapshot)
    assert (snapshot.running, snapshot.waiting, snapshot.worker_restarts) == (3, 4, 2)
    assert (snapshot.kv_blocks_total, snapshot.kv_blocks_used, snapshot.kv_blocks_cached) == (150, 30, 20)
    assert {name: getattr(snapshot, name) for name in counters} == counters


def test_idle_counts_only_while_there_was_work(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    busy: Any = SimpleNamespace(requests={"r": 1}, has=lambda request_id: True)
    rest: Any = SimpleNamespace(requests={}, has=lambda request_id: False)
    meter.admitted("r", 999.0, after_rest=True)
    clock.now = 1000.3  # 0.1 s until it was sent, then 0.2 s of device time
    meter.sent(Batch("m@1", 1, [Scheduled(0, 0, 5, True)], sent_s=1000.1), 5, ["r"])
    first = SequenceOutput("r", 0, 0, [1])
    assert meter.observe(BatchResult("m@1", 1, [], 0, 1000.3, 0.2), [first], busy) == {"r": pytest.approx(1.1)}
    assert meter.idle_s == pytest.approx(0.1)
    assert [meter.queue.total, meter.prefill.total] == pytest.approx([1.1, 0.2])
    clock.now = 1000.8
    meter.observe(BatchResult("m@1", 2, [], 0, 1000.8, 0.2), [SequenceOutput("r", 0, 1, [1], [], "stop")], rest)
    assert meter.idle_s == pytest.approx(0.4)
    assert meter.decode.total == pytest.approx(0.5)
    clock.now = 2000.0  # nothing to do
    meter.admitted("s", 0.0, after_rest=True)
    clock.now = 2000.2
    meter.observe(BatchResult("m@1", 3, [], 0, 2000.2, 0.2), [], busy)
    assert meter.idle_s == pytest.approx(0.4)
    assert meter.prefill_step.count == 1  # five tokens in one row
