"""Statistics: what each process counts, as snapshots that ride on its heartbeats. One field is one metric.

Counters only grow; a gauge is the value of the moment; a Histogram has fixed bounds, so that snapshots of several
processes add up. Field metadata gives the kind and the help text that /metrics prints.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

LATENCY_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip


def counter(help: str) -> Meta:
    """Metadata of a field that only grows."""
    return Meta(description=help, extra={"kind": "counter"})


def gauge(help: str) -> Meta:
    """Metadata of a field that is the value of the moment."""
    return Meta(description=help, extra={"kind": "gauge"})


class Histogram(msgspec.Struct):
    """Counts by upper bound (seconds); the last count is of what lies above all bounds."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    total_s: float = 0.0

    def observe(self, value_s: float, times: int = 1) -> None:
        """Count a duration."""
        self.counts[bisect.bisect_left(LATENCY_BOUNDS_S, value_s)] += times
        self.total_s += value_s * times

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the observations lie (linear inside a bucket), or None without any."""
        rank, seen = share * self.count, 0
        if self.count == 0:
            return None
        low = 0.0
        for bound, count in zip(LATENCY_BOUNDS_S, self.counts[:-1], strict=True):
            if count and seen + count >= rank:
                return low + (bound - low) * (rank - seen) / count
            seen += count
            low = bound
        return low

    def added(self, other: Histogram) -> Histogram:
        """The sum of two."""
        pairs = zip(self.counts, other.counts, strict=True)
        return Histogram([a + b for a, b in pairs], self.total_s + other.total_s)

    def since(self, earlier: Histogram) -> Histogram:
        """What was observed after `earlier`, a snapshot of the same histogram."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Histogram([max(0, a - b) for a, b in pairs], self.total_s - earlier.total_s)


class EngineSnapshot(msgspec.Struct, tag="engine"):
    """The scheduler process."""

    running: Annotated[int, gauge("sequences that hold KV blocks")] = 0
    waiting: Annotated[int, gauge("requests and preempted sequences that wait for blocks or a row")] = 0
    kv_blocks_total: Annotated[int, gauge("KV blocks")] = 0
    kv_blocks_used: Annotated[int, gauge("KV blocks held by sequences")] = 0
    kv_blocks_cached: Annotated[int, gauge("free KV blocks whose content can be reused")] = 0
    steps: Annotated[int, counter("steps answered by the workers")] = 0
    step_tokens: Annotated[int, counter("token positions computed")] = 0
    busy_s: Annotated[float, counter("seconds of device time in steps")] = 0.0
    prompt_tokens: Annotated[int, counter("prompt tokens of admitted requests")] = 0
    cached_tokens: Annotated[int, counter("prompt tokens that the prefix cache gave")] = 0
    output_tokens: Annotated[int, counter("tokens generated")] = 0
    preemptions: Annotated[int, counter("sequences preempted for want of blocks")] = 0
    recomputed_tokens: Annotated[int, counter("tokens computed again after preemption")] = 0
    requests: Annotated[int, counter("requests admitted")] = 0
    aborted: Annotated[int, counter("requests whose client went away")] = 0
    worker_restarts: Annotated[int, counter("times the worker group came back")] = 0
    step: Annotated[Histogram, counter("seconds from sending a Batch to its BatchResult")] = msgspec.field(
        default_factory=Histogram
    )


class TokenizerSnapshot(msgspec.Struct, tag="tokenizer"):
    """A tokenizer process."""

    live: Annotated[int, gauge("requests under way")] = 0
    encoded_tokens: Annotated[int, counter("prompt tokens encoded")] = 0
    decoded_tokens: Annotated[int, counter("output tokens decoded")] = 0
    stop_hits: Annotated[int, counter("choices ended by a stop string")] = 0


class ApiSnapshot(msgspec.Struct, tag="api"):
    """An api process."""

    live: Annotated[int, gauge("requests under way")] = 0
    requests: Annotated[int, counter("requests begun")] = 0
    finished: Annotated[int, counter("requests finished")] = 0
    rejected: Annotated[int, counter("requests rejected before they began")] = 0
    failed: Annotated[int, counter("requests failed after they began")] = 0
    aborted: Annotated[int, counter("requests whose client went away")] = 0
    errors: Annotated[dict[str, int], counter("errors by code")] = {}
    ttft: Annotated[Histogram, counter("seconds to the first token")] = msgspec.field(default_factory=Histogram)
    inter_token: Annotated[Histogram, counter("seconds between tokens")] = msgspec.field(default_factory=Histogram)
    end_to_end: Annotated[Histogram, counter("seconds from request to ending")] = msgspec.field(
        default_factory=Histogram
    )


class WorkerSnapshot(msgspec.Struct, tag="worker"):
    """A worker process."""

    device: str = ""
    weights_bytes: Annotated[int, gauge("bytes of weights")] = 0
    kv_bytes: Annotated[int, gauge("bytes of KV cache")] = 0
    steps: Annotated[int, counter("steps run")] = 0
    busy_s: Annotated[float, counter("seconds in steps")] = 0.0
    idle_s: Annotated[float, counter("seconds without a step to run while there was work")] = 0.0
    graph_hits: Annotated[int, counter("steps replayed from a graph")] = 0
    graph_misses: Annotated[int, counter("steps launched kernel by kernel")] = 0


Snapshot = EngineSnapshot | TokenizerSnapshot | ApiSnapshot | WorkerSnapshot
S = TypeVar("S", EngineSnapshot, TokenizerSnapshot, ApiSnapshot, WorkerSnapshot)
_decoder: msgspec.msgpack.Decoder[Snapshot] = msgspec.msgpack.Decoder(Snapshot)


def decode(payload: bytes) -> Snapshot | None:
    """A heartbeat's snapshot, or None when it carried none."""
    return _decoder.decode(payload) if payload else None


def merge(snapshots: Iterable[S]) -> S | None:
    """One snapshot of several processes of the same kind: numbers and histograms add up."""
    total: S | None = None
    for snapshot in snapshots:
        total = snapshot if total is None else _added(total, snapshot)
    return total


def _added(one: S, two: S) -> S:
    changes: dict[str, Any] = {}
    for field in msgspec.structs.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, Histogram):
            changes[field.name] = a.added(b)
        elif isinstance(a, dict):
            changes[field.name] = {key: a.get(key, 0) + b.get(key, 0) for key in a | b}
        elif isinstance(a, str):
            changes[field.name] = a or b
        else:
            changes[field.name] = a + b
    return msgspec.structs.replace(one, **changes)
