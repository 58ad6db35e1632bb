"""Statistics: snapshots travel, histograms add up, quantiles are where they should be."""

from __future__ import annotations

import random

import msgspec
import pytest

from core.stats import LATENCY_BOUNDS_S, ApiSnapshot, EngineSnapshot, Histogram, WorkerSnapshot, decode, merge


def test_round_trip() -> None:
    snapshot = ApiSnapshot(requests=3, errors={"queue_full": 2})
    snapshot.ttft.observe(0.02)
    assert decode(msgspec.msgpack.encode(snapshot)) == snapshot
    assert decode(b"") is None


def test_merge_adds_numbers_histograms_and_codes() -> None:
    one, two = ApiSnapshot(requests=3, errors={"a": 1}), ApiSnapshot(requests=4, errors={"a": 2, "b": 5})
    one.ttft.observe(0.02, 3)
    two.ttft.observe(7.0)
    total = merge([one, two])
    assert total is not None
    assert (total.requests, total.errors, total.ttft.count) == (7, {"a": 3, "b": 5}, 4)
    assert total.ttft.total == pytest.approx(7.06)
    workers = merge([WorkerSnapshot(device="x", steps=1), WorkerSnapshot(device="x", steps=2)])
    assert workers is not None
    assert (workers.device, workers.steps) == ("x", 3)
    assert merge(list[EngineSnapshot]()) is None


def test_quantiles_lie_in_the_right_bucket() -> None:
    rng = random.Random(1)
    values = sorted(rng.expovariate(20) for _ in range(5000))
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    for share in (0.1, 0.5, 0.9, 0.99):
        exact = values[int(share * len(values))]
        low = max((b for b in LATENCY_BOUNDS_S if b < exact), default=0.0)
        high = min(b for b in LATENCY_BOUNDS_S if b >= exact)
        assert low * 0.99 <= (histogram.quantile(share) or 0) <= high * 1.01
    assert Histogram().quantile(0.5) is None


def test_since() -> None:
    earlier = Histogram()
    earlier.observe(1.0)
    later = earlier.added(Histogram())
    later.observe(0.01, 2)
    assert later.since(earlier).count == 2
