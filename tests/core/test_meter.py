"""StepMeter: what it counts, and how long it says that a queue will take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from core import meter as module
from core.messages import Batch, BatchResult, Scheduled, SequenceOutput
from core.meter import StepMeter
from core.stats import EngineSnapshot

NOTHING = SimpleNamespace(dequeued=0, dequeued_tokens=0)


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
    scheduler: Any = SimpleNamespace(requests={}, has=lambda request_id: False, counters=NOTHING, num_waiting=0)
    meter.observe(BatchResult("m@1", 1, [], busy_s=0.25), [ending(reason) for reason in reasons], scheduler)


def test_steps_and_busy_time_add_up(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    observe(meter, 999.9, None, "stop")
    observe(meter, 998.0)
    assert (meter.steps, meter.busy_s, meter.step.count) == (2, 0.5, 2)
    assert meter.step.total == pytest.approx(2.1)


def test_refusals_are_counted_by_bound() -> None:
    meter = StepMeter()
    for bound in ("max_queued_tokens", "max_queued_requests", "max_queued_tokens"):
        meter.refuse(bound)
    assert meter.refused == {"max_queued_tokens": 2, "max_queued_requests": 1}


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
        queued_tokens=900,
    )
    meter = StepMeter()
    meter.worker_restarts = 2
    snapshot = meter.snapshot(cast("Any", scheduler))
    assert isinstance(snapshot, EngineSnapshot)
    assert (snapshot.running, snapshot.waiting, snapshot.worker_restarts) == (3, 4, 2)
    assert snapshot.queued_tokens == 900
    assert (snapshot.kv_blocks_total, snapshot.kv_blocks_used, snapshot.kv_blocks_cached) == (150, 30, 20)
    assert {name: getattr(snapshot, name) for name in counters} == counters


def test_idle_counts_only_while_there_was_work(clock: SimpleNamespace) -> None:
    meter = StepMeter()
    busy: Any = SimpleNamespace(requests={"r": 1}, has=lambda request_id: True, counters=NOTHING, num_waiting=0)
    rest: Any = SimpleNamespace(requests={}, has=lambda request_id: False, counters=NOTHING, num_waiting=0)
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
