"""Aliases under other servers' names: the cause moves, then value, unit and label are read from the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from api.families import exposed
from api.routes.metrics import Figures
from core.messages import StatsReply
from core.stats import ApiSnapshot, DeviceFigures, EngineSnapshot, SupervisorSnapshot

V = 'engine="0",model_name="m"'


def text_of(*snapshots: Any) -> list[str]:
    packed = {str(i): msgspec.msgpack.encode(snapshot) for i, snapshot in enumerate(snapshots)}
    registry = CollectorRegistry()
    registry.register(Figures(StatsReply(1, "ready", packed, {}), "m"))
    return exposed(generate_latest(registry)).decode().splitlines()


def moved(cause: Callable[[EngineSnapshot, ApiSnapshot], Any]) -> list[str]:
    engine, api = EngineSnapshot(kv_blocks_total=200), ApiSnapshot()
    cause(engine, api)
    return text_of(engine, api)


GAUGES = [
    ("running", 3, [f"vllm:num_requests_running{{{V}}} 3.0", "tgi_batch_current_size 3.0"]),
    ("waiting", 4, [f"vllm:num_requests_waiting{{{V}}} 4.0", "tgi_queue_size 4.0"]),
    ("kv_blocks_used", 50, [f"vllm:kv_cache_usage_perc{{{V}}} 0.25"]),
    ("preemptions", 5, [f"vllm:num_preemptions_total{{{V}}} 5.0"]),
    ("cached_tokens", 6, [f"vllm:prefix_cache_hits_total{{{V}}} 6.0", f"vllm:prompt_tokens_cached_total{{{V}}} 6.0"]),
    ("prompt_tokens", 7, [f"vllm:prefix_cache_queries_total{{{V}}} 7.0", f"vllm:prompt_tokens_total{{{V}}} 7.0"]),
    ("output_tokens", 8, [f"vllm:generation_tokens_total{{{V}}} 8.0"]),
]
HISTOGRAMS = [
    ("engine", "tokens_per_step", ["vllm:iteration_tokens_total"]),
    ("engine", "queue", ["vllm:request_queue_time_seconds", "tgi_request_queue_duration"]),
    ("engine", "prefill", ["vllm:request_prefill_time_seconds"]),
    ("engine", "decode", ["vllm:request_decode_time_seconds"]),
    ("engine", "rows_per_step", ["tgi_batch_next_size"]),
    ("api", "ttft", ["vllm:time_to_first_token_seconds"]),
    ("api", "inter_token", ["vllm:inter_token_latency_seconds"]),
    (
        "api",
        "time_per_token",
        ["vllm:request_time_per_output_token_seconds", "tgi_request_mean_time_per_token_duration"],
    ),
    ("api", "end_to_end", ["vllm:e2e_request_latency_seconds", "tgi_request_duration"]),
    ("api", "tokenize", ["tgi_request_validation_duration"]),
    ("api", "request_prompt_tokens", ["vllm:request_prompt_tokens", "tgi_request_input_length"]),
    ("api", "request_output_tokens", ["vllm:request_generation_tokens", "tgi_request_generated_tokens"]),
    ("api", "request_max_tokens", ["vllm:request_params_max_tokens", "tgi_request_max_new_tokens"]),
    ("api", "request_choices", ["vllm:request_params_n"]),
]


@pytest.mark.parametrize(("field", "value", "lines"), GAUGES)
def test_numbers(field: str, value: int, lines: list[str]) -> None:
    before, after = moved(lambda engine, api: None), moved(lambda engine, api: setattr(engine, field, value))
    for line in lines:
        assert line in after
        assert line not in before


@pytest.mark.parametrize(("who", "field", "names"), HISTOGRAMS)
def test_histograms(who: str, field: str, names: list[str]) -> None:
    found = moved(lambda engine, api: getattr({"engine": engine, "api": api}[who], field).observe(2.0, 3))
    for name in names:
        labels = f"{{{V}}}" if name.startswith("vllm") else ""
        assert f"{name}_count{labels} 3.0" in found
        assert f"{name}_sum{labels} 6.0" in found  # seconds, or things: never milliseconds
        below = '{engine="0",le="1.0",model_name="m"}' if labels else '{le="1.0"}'
        assert f"{name}_bucket{below} 0.0" in found
        assert f"# TYPE {name} histogram" in found


def test_reasons_errors_and_steps() -> None:
    def cause(engine: EngineSnapshot, api: ApiSnapshot) -> None:
        engine.waiting, engine.waiting_by = 5, {"rows": 3, "prompt": 2}
        api.finish_reasons, api.errors = {"length": 4, "abort": 1}, {"queue_full": 2}
        api.requests, api.finished = 9, 8
        engine.step.observe(0.5, 3)
        engine.prefill_step.observe(0.5)

    found = moved(cause)
    for line in (
        f'vllm:num_requests_waiting_by_reason{{{V},reason="capacity"}} 3.0',
        f'vllm:num_requests_waiting_by_reason{{{V},reason="deferred"}} 2.0',
        'quire_engine_waiting_by{reason="rows"} 3.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 4.0',
        'vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 0.0',
        'tgi_request_failure{err="queue_full"} 2.0',
        "tgi_request_count 9.0",
        "tgi_request_success 8.0",
        "# TYPE tgi_request_count counter",
        'tgi_batch_inference_count{method="prefill"} 1.0',
        'tgi_batch_inference_success{method="decode"} 2.0',
        'tgi_batch_inference_duration_sum{method="decode"} 1.0',
        'tgi_batch_inference_duration_count{method="prefill"} 1.0',
    ):
        assert line in found


def test_energy_and_cost() -> None:
    devices = [DeviceFigures(0, "H", "u", True, energy_j=500.0), DeviceFigures(1, "H", "v", False, energy_j=9e9)]
    seen = SupervisorSnapshot(uptime_s=1800.0, devices=devices, num_devices=2, gpu_price_per_hour=3.0)
    found = text_of(EngineSnapshot(output_tokens=1000), seen)
    assert "quire_tokens_per_joule 2.0" in found
    assert "quire_cost_total 3.0" in found
    assert "quire_cost_per_million_tokens 3000.0" in found
    assert not any(line.startswith("quire_cost") for line in text_of(EngineSnapshot(output_tokens=1000)))
