"""Statistics: what each process counts, as snapshots that ride on its heartbeats. One field is one metric.

Counters only grow; a gauge is the value of the moment; a Histogram has fixed bounds, so that snapshots of several
processes add up. Field metadata gives the kind and the help text that /metrics prints.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

LATENCY_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
COUNT_BOUNDS = tuple(float(2**power) for power in range(21))  # 1 to a million: tokens of a step, of a request
MAX_INCIDENTS = 8  # that each process remembers


def counter(help: str, label: str = "") -> Meta:
    """Metadata of a field that only grows. `label` names the keys of a dict."""
    return Meta(description=help, extra={"kind": "counter", "label": label})


def gauge(help: str, label: str = "") -> Meta:
    """Metadata of a field that is the value of the moment. `label` names the keys of a dict."""
    return Meta(description=help, extra={"kind": "gauge", "label": label})


class Histogram(msgspec.Struct):
    """Counts by upper bound (seconds); the last count is of what lies above all bounds. `total`: the values' sum."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    total: float = 0.0
    bounds: ClassVar[tuple[float, ...]] = LATENCY_BOUNDS_S
    unit: ClassVar[str] = "seconds"

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """None without observations."""
        count = self.count
        return self.total / count if count else None

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the observations lie (linear inside a bucket), or None without any."""
        rank, seen = share * self.count, 0
        if self.count == 0:
            return None
        low = 0.0
        for bound, count in zip(self.bounds, self.counts[:-1], strict=True):
            if count and seen + count >= rank:
                return low + (bound - low) * (rank - seen) / count
            seen += count
            low = bound
        return low

    def added(self: H, other: H) -> H:
        """The sum of two."""
        pairs = zip(self.counts, other.counts, strict=True)
        return type(self)([a + b for a, b in pairs], self.total + other.total)

    def since(self: H, earlier: H) -> H:
        """What was observed after `earlier`, a snapshot of the same histogram."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return type(self)([max(0, a - b) for a, b in pairs], max(0.0, self.total - earlier.total))


class CountHistogram(Histogram):
    """A Histogram of numbers of things: buckets double from 1."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(COUNT_BOUNDS) + 1))
    bounds: ClassVar[tuple[float, ...]] = COUNT_BOUNDS
    unit: ClassVar[str] = ""


H = TypeVar("H", bound=Histogram)


def _latencies() -> Any:
    return msgspec.field(default_factory=Histogram)


def _counts() -> Any:
    return msgspec.field(default_factory=CountHistogram)


class Incident(msgspec.Struct, frozen=True):
    """Something that went wrong. `at` is Unix time. Never holds what a client sent."""

    at: float
    code: str
    cause: str


class LiveRequest(msgspec.Struct, frozen=True):
    """A request under way, for the list of the longest-running and the largest."""

    request_id: str
    age_s: float
    output_tokens: int
    num_choices: int


class EngineSnapshot(msgspec.Struct, tag="engine"):
    """The scheduler process."""

    running: Annotated[int, gauge("sequences that hold KV blocks")] = 0
    waiting: Annotated[int, gauge("requests and preempted sequences that wait for blocks or a row")] = 0
    waiting_by: Annotated[dict[str, int], gauge("waiting sequences by what they wait for", "reason")] = {}
    queued_tokens: Annotated[int, gauge("prompt tokens of requests that have not begun")] = 0
    kv_blocks_total: Annotated[int, gauge("KV blocks")] = 0
    kv_blocks_used: Annotated[int, gauge("KV blocks held by sequences")] = 0
    kv_blocks_cached: Annotated[int, gauge("free KV blocks whose content can be reused")] = 0
    steps: Annotated[int, counter("steps answered by the workers")] = 0
    step_tokens: Annotated[int, counter("token positions computed")] = 0
    busy_s: Annotated[float, counter("seconds of device time in steps")] = 0.0
    idle_s: Annotated[float, counter("seconds that the device stood still although there was work")] = 0.0
    prompt_tokens: Annotated[int, counter("prompt tokens of admitted requests")] = 0
    cached_tokens: Annotated[int, counter("prompt tokens that the prefix cache gave")] = 0
    output_tokens: Annotated[int, counter("tokens generated")] = 0
    preemptions: Annotated[int, counter("sequences preempted for want of blocks")] = 0
    recomputed_tokens: Annotated[int, counter("tokens computed again after preemption")] = 0
    requests: Annotated[int, counter("requests admitted")] = 0
    aborted: Annotated[int, counter("requests whose client went away")] = 0
    refused: Annotated[dict[str, int], counter("requests refused, by the bound that was reached", "bound")] = {}
    expired: Annotated[dict[str, int], counter("requests whose deadline passed, by what they did", "state")] = {}
    worker_restarts: Annotated[int, counter("times the worker group came back")] = 0
    step: Annotated[Histogram, counter("seconds from sending a Batch to its BatchResult")] = _latencies()
    prefill_step: Annotated[Histogram, counter("the same, of steps that computed a piece of a prompt")] = _latencies()
    tokens_per_step: Annotated[CountHistogram, counter("token positions of each step")] = _counts()
    rows_per_step: Annotated[CountHistogram, counter("sequences of each step")] = _counts()
    queue: Annotated[Histogram, counter("seconds from a request's arrival to its first step")] = _latencies()
    prefill: Annotated[Histogram, counter("seconds from a request's first step to its first token")] = _latencies()
    decode: Annotated[Histogram, counter("seconds from a request's first token to its last")] = _latencies()


class TokenizerSnapshot(msgspec.Struct, tag="tokenizer"):
    """A tokenizer process."""

    live: Annotated[int, gauge("requests under way")] = 0
    encoded_tokens: Annotated[int, counter("prompt tokens encoded")] = 0
    decoded_tokens: Annotated[int, counter("output tokens decoded")] = 0
    stop_hits: Annotated[int, counter("choices ended by a stop string")] = 0
    queued: Annotated[int, gauge("requests that wait to be tokenized")] = 0
    expired: Annotated[int, counter("requests whose deadline passed before they were tokenized")] = 0


class ApiSnapshot(msgspec.Struct, tag="api"):
    """An api process. What is said per request is counted at its ending."""

    live: Annotated[int, gauge("requests under way")] = 0
    requests: Annotated[int, counter("requests begun")] = 0
    finished: Annotated[int, counter("requests finished")] = 0
    rejected: Annotated[int, counter("requests rejected before they began")] = 0
    failed: Annotated[int, counter("requests failed after they began")] = 0
    aborted: Annotated[int, counter("requests whose client went away")] = 0
    refused: Annotated[dict[str, int], counter("requests refused at the door, by the bound", "bound")] = {}
    expired: Annotated[int, counter("requests whose deadline passed while nothing below answered")] = 0
    errors: Annotated[dict[str, int], counter("errors that clients were told", "code")] = {}
    finish_reasons: Annotated[dict[str, int], counter("choices ended", "reason")] = {}
    ttft: Annotated[Histogram, counter("seconds to the first token")] = _latencies()
    inter_token: Annotated[Histogram, counter("seconds between tokens")] = _latencies()
    end_to_end: Annotated[Histogram, counter("seconds from request to ending")] = _latencies()
    tokenize: Annotated[Histogram, counter("seconds until the prompt was tokenized")] = _latencies()
    time_per_token: Annotated[Histogram, counter("a request's mean seconds per token after the first")] = _latencies()
    request_prompt_tokens: Annotated[CountHistogram, counter("prompt tokens of each request")] = _counts()
    request_output_tokens: Annotated[CountHistogram, counter("generated tokens of each request")] = _counts()
    request_max_tokens: Annotated[CountHistogram, counter("max_tokens of each request that set it")] = _counts()
    request_choices: Annotated[CountHistogram, counter("n of each request")] = _counts()
    incidents: list[Incident] = []
    largest: list[LiveRequest] = []


class WorkerSnapshot(msgspec.Struct, tag="worker"):
    """A worker process."""

    device: str = ""
    weights_bytes: Annotated[int, gauge("bytes of weights")] = 0
    kv_bytes: Annotated[int, gauge("bytes of KV cache")] = 0
    steps: Annotated[int, counter("steps run")] = 0
    busy_s: Annotated[float, counter("seconds in steps")] = 0.0
    graph_hits: Annotated[int, counter("steps replayed from a graph")] = 0
    graph_misses: Annotated[int, counter("steps launched kernel by kernel")] = 0


class ProcessFigures(msgspec.Struct, frozen=True):
    """One process of the server. `cpu_s`: processor seconds since its start."""

    pid: int
    cpu_s: float
    memory_bytes: int
    restarts: int = 0


class DeviceFigures(msgspec.Struct, frozen=True):
    """One GPU of the machine, as its driver tells; None: the driver does not. `ours`: this server computes on it.

    `energy_j` counts from this server's start.
    """

    index: int
    name: str
    uuid: str = ""
    ours: bool = False
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    energy_j: float | None = None


class SupervisorSnapshot(msgspec.Struct, tag="supervisor"):
    """The supervisor: what it sees of the processes and of the machine."""

    model: str = ""
    uptime_s: Annotated[float, gauge("seconds since the server began to start")] = 0.0
    processes: dict[str, ProcessFigures] = {}
    devices: list[DeviceFigures] = []
    num_devices: int = 1  # that are paid for
    gpu_price_per_hour: float | None = None
    incidents: list[Incident] = []


Snapshot = EngineSnapshot | TokenizerSnapshot | ApiSnapshot | WorkerSnapshot | SupervisorSnapshot
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
        elif isinstance(a, str) or a is None:
            changes[field.name] = a or b
        else:
            changes[field.name] = a + b
    return msgspec.structs.replace(one, **changes)
