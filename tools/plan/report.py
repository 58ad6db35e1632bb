"""Report: the answer of `quire plan`, as `--json` prints it; `--json-schema` prints the schema of these structs.

Sizes are bytes, times seconds, rates tokens per second of the whole engine, prices in the currency of the options.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tools.plan.cost import Cost

SCHEMA_VERSION = 1

Status = Literal["fits", "fewer", "too_small", "impossible"]
"""fits: all sequences of the load at once. fewer: some wait for memory. too_small: not one sequence fits. impossible:
the GPU or the model's sizes forbid it. `reason` says why."""


class LoadReport(msgspec.Struct, frozen=True):
    """The load that was planned for: a closed loop."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int


class ModelReport(msgspec.Struct, frozen=True):
    """What config.json says. weights_bytes: by precision, whole model; int8 and int4 are served on CPUs only.
    kv_bytes_per_token: by --kv-dtype, over all layers, one rank."""

    name: str
    max_model_len: int
    parameters: int
    weights_bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]


class MemoryReport(msgspec.Struct, frozen=True):
    """Of one GPU, except `kv_tokens` and `sequences`, which the GPUs of a plan hold together."""

    total_bytes: int
    reserved_bytes: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    kv_tokens: int
    sequences: int
    """Of the load's prompt and output, at once."""


class LimitReport(msgspec.Struct, frozen=True):
    """What bytes and operations allow. `seconds`: of one step, by kind of work."""

    tokens_per_s: float
    step_s: float
    bound: str
    """What takes longest."""
    seconds: dict[str, float]


class ExpectedReport(msgspec.Struct, frozen=True):
    """The limit times the fitted efficiency. `concurrency`: sequences that run at once, at most the load's."""

    concurrency: int
    tokens_per_s: float
    tokens_per_s_low: float
    tokens_per_s_high: float
    """Low and high: by the largest error on the loads held out of the fit."""
    efficiency: float
    """Of the limit."""
    inter_token_s: float | None
    """None when the answer is one token."""
    ttft_s: float
    """Median under this load."""
    ttft_idle_s: float
    """Of one request alone."""


class PlanReport(msgspec.Struct, frozen=True):
    """One number of one kind of GPU. Without memory, limit and expected when it is impossible."""

    gpu: str
    name: str
    gpus: int
    quantization: str
    kv_dtype: str
    status: Status
    measured: bool
    """Whether Quire was measured on this, or it is extrapolated from what was."""
    reason: str = ""
    instead: list[str] = []
    """What would take the whole load."""
    notes: list[str] = []
    command: str = ""
    memory: MemoryReport | None = None
    limit: LimitReport | None = None
    expected: ExpectedReport | None = None
    cost: Cost | None = None


class FitReport(msgspec.Struct, frozen=True):
    """Where the efficiency is from. Errors are shares of the measured value, on the loads held out of the fit."""

    gpu: str
    date: str
    loads_fitted: int
    loads_held_out: int
    tokens_per_s_mean_error: float
    tokens_per_s_largest_error: float
    ttft_mean_error: float
    ttft_largest_error: float


class Report(msgspec.Struct, frozen=True):
    """The whole answer."""

    schema_version: int
    model: ModelReport
    load: LoadReport
    gpu_memory_utilization: float
    fit: FitReport
    plans: list[PlanReport]
