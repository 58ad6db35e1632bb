"""Families: metrics that follow from several figures: the machine's, and aliases under other servers' names.

An alias is exposed only where Quire measures the same thing in the same unit; what it does not measure has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from core.stats import ApiSnapshot, EngineSnapshot, Histogram, SupervisorSnapshot

# Names of counters that are exposed without the suffix _total, as the dashboards for them expect.
_BARE = re.compile(rb"^# TYPE (tgi_\w+) unknown$|^# TYPE (tgi_\w+) untyped$", re.MULTILINE)


def histogram(name: str, text: str, value: Histogram, labels: dict[str, str] | None = None) -> HistogramMetricFamily:
    """A Histogram with all of its buckets."""
    bounds = [*map(str, value.bounds), "+Inf"]
    family = HistogramMetricFamily(name, text, labels=list(labels or {}))
    buckets = list(zip(bounds, accumulate(value.counts), strict=True))
    family.add_metric(list((labels or {}).values()), buckets=buckets, sum_value=value.total)
    return family


def exposed(text: bytes) -> bytes:
    """The text of all families, with the type of the counters that have no suffix."""
    return _BARE.sub(lambda match: b"# TYPE " + (match[1] or match[2]) + b" counter", text)


def machine(seen: SupervisorSnapshot, output_tokens: int) -> Iterator[Metric]:
    """Processes and devices, and what a token takes of energy and money."""
    cpu = CounterMetricFamily("quire_process_cpu_seconds", "processor time", labels=["process"])
    memory = GaugeMetricFamily("quire_process_memory_bytes", "resident memory", labels=["process"])
    restarts = CounterMetricFamily("quire_process_restarts", "times it was started again", labels=["process"])
    for name, process in seen.processes.items():
        cpu.add_metric([name], process.cpu_s)
        memory.add_metric([name], process.memory_bytes)
        restarts.add_metric([name], process.restarts)
    yield from (cpu, memory, restarts)
    labels = ["gpu", "name", "uuid", "ours"]
    for field, name, text in (
        ("memory_used_bytes", "quire_device_memory_used_bytes", "device memory in use"),
        ("memory_total_bytes", "quire_device_memory_total_bytes", "device memory"),
        ("utilization_percent", "quire_device_utilization_percent", "time with a kernel running, as the driver says"),
        ("temperature_c", "quire_device_temperature_celsius", "temperature"),
        ("power_w", "quire_device_power_watts", "power draw"),
        ("energy_j", "quire_device_energy_joules", "energy since the server's start"),
    ):
        kind = CounterMetricFamily if field == "energy_j" else GaugeMetricFamily
        family = kind(name, text, labels=labels)
        for device in seen.devices:
            if (value := getattr(device, field)) is not None:
                family.add_metric([str(device.index), device.name, device.uuid, str(device.ours).lower()], value)
        yield family
    energy = [device.energy_j for device in seen.devices if device.ours and device.energy_j is not None]
    if energy and sum(energy) > 0:
        yield GaugeMetricFamily("quire_tokens_per_joule", "output tokens since the start", output_tokens / sum(energy))
    if (cost := cost_so_far(seen)) is not None:
        yield CounterMetricFamily("quire_cost", "GPU hours so far times --gpu-price-per-hour", value=cost)
        if output_tokens:
            text = "of output tokens since the start, idle time included"
            yield GaugeMetricFamily("quire_cost_per_million_tokens", text, cost / output_tokens * 1e6)


def cost_so_far(seen: SupervisorSnapshot) -> float | None:
    """In the currency of --gpu-price-per-hour; None without it."""
    if seen.gpu_price_per_hour is None:
        return None
    return seen.gpu_price_per_hour * seen.num_devices * seen.uptime_s / 3600


def aliases(engine: EngineSnapshot, api: ApiSnapshot, model: str) -> Iterator[Metric]:
    """Quire's figures under vLLM's and TGI's names."""
    yield from _vllm(engine, api, {"model_name": model, "engine": "0"})
    yield from _tgi(engine, api)


def _vllm(engine: EngineSnapshot, api: ApiSnapshot, labels: dict[str, str]) -> Iterator[Metric]:
    names, values = list(labels), list(labels.values())
    total = max(1, engine.kv_blocks_total)
    for name, text, value in (
        ("num_requests_running", "sequences that run", engine.running),
        ("num_requests_waiting", "sequences that wait", engine.waiting),
        ("kv_cache_usage_perc", "share of KV blocks in use, 0 to 1", engine.kv_blocks_used / total),
    ):
        gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
        gauge.add_metric(values, value)
        yield gauge
    deferred = engine.waiting_by.get("prompt", 0)
    reasons = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "sequences that wait", labels=[*names, "reason"])
    reasons.add_metric([*values, "capacity"], engine.waiting - deferred)
    reasons.add_metric([*values, "deferred"], deferred)
    yield reasons
    for name, text, value in (
        ("num_preemptions", "preempted sequences", engine.preemptions),
        ("prefix_cache_queries", "prompt tokens looked up in the prefix cache", engine.prompt_tokens),
        ("prefix_cache_hits", "prompt tokens that the prefix cache gave", engine.cached_tokens),
        ("prompt_tokens", "prompt tokens", engine.prompt_tokens),
        ("prompt_tokens_cached", "prompt tokens that the prefix cache gave", engine.cached_tokens),
        ("generation_tokens", "generated tokens", engine.output_tokens),
    ):
        counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
        counter.add_metric(values, value)
        yield counter
    ended = CounterMetricFamily("vllm:request_success", "ended choices", labels=[*names, "finished_reason"])
    for reason in ("stop", "length", "abort"):
        ended.add_metric([*values, reason], api.finish_reasons.get(reason, 0))
    yield ended
    for name, text, found in (
        ("iteration_tokens_total", "tokens of each step", engine.tokens_per_step),
        ("time_to_first_token_seconds", "time to first token", api.ttft),
        ("inter_token_latency_seconds", "time between tokens", api.inter_token),
        ("request_time_per_output_token_seconds", "a request's mean time per token", api.time_per_token),
        ("e2e_request_latency_seconds", "from request to ending", api.end_to_end),
        ("request_queue_time_seconds", "from arrival to the first step", engine.queue),
        ("request_prefill_time_seconds", "from the first step to the first token", engine.prefill),
        ("request_decode_time_seconds", "from the first token to the last", engine.decode),
        ("request_prompt_tokens", "prompt tokens of each request", api.request_prompt_tokens),
        ("request_generation_tokens", "generated tokens of each request", api.request_output_tokens),
        ("request_params_n", "n of each request", api.request_choices),
        ("request_params_max_tokens", "max_tokens of each request", api.request_max_tokens),
    ):
        yield histogram(f"vllm:{name}", text, found, labels)


def _tgi(engine: EngineSnapshot, api: ApiSnapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily("tgi_queue_size", "sequences that wait", engine.waiting)
    yield GaugeMetricFamily("tgi_batch_current_size", "sequences that run", engine.running)
    yield _bare_counter("tgi_request_count", "requests", [({}, api.requests)])
    yield _bare_counter("tgi_request_success", "finished requests", [({}, api.finished)])
    failures = [({"err": code}, float(count)) for code, count in api.errors.items()]
    yield _bare_counter("tgi_request_failure", "errors that clients were told", failures)
    decode_step = engine.step.since(engine.prefill_step)
    by_method = {"prefill": engine.prefill_step, "decode": decode_step}
    steps = [({"method": method}, float(found.count)) for method, found in by_method.items()]
    yield _bare_counter("tgi_batch_inference_count", "answered steps", steps)
    yield _bare_counter("tgi_batch_inference_success", "answered steps", steps)
    duration = HistogramMetricFamily("tgi_batch_inference_duration", "seconds of each step", labels=["method"])
    for method, found in by_method.items():
        duration.samples += histogram("tgi_batch_inference_duration", "", found, {"method": method}).samples
    yield duration
    for name, text, found in (
        ("request_duration", "seconds from request to ending", api.end_to_end),
        ("request_queue_duration", "seconds from arrival to the first step", engine.queue),
        ("request_validation_duration", "seconds until the prompt was tokenized", api.tokenize),
        ("request_mean_time_per_token_duration", "a request's mean seconds per token", api.time_per_token),
        ("request_input_length", "prompt tokens of each request", api.request_prompt_tokens),
        ("request_generated_tokens", "generated tokens of each request", api.request_output_tokens),
        ("request_max_new_tokens", "max_tokens of each request", api.request_max_tokens),
        ("batch_next_size", "sequences of each step", engine.rows_per_step),
    ):
        yield histogram(f"tgi_{name}", text, found)


def _bare_counter(name: str, text: str, samples: list[tuple[dict[str, str], float]]) -> Metric:
    """A counter whose name has no suffix; see `exposed`."""
    family = Metric(name, text, "unknown")
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family
