"""`quire status`: figures from two looks, the table drawn from them, and what is said when no server runs."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from api.routes.stats import stats_of
from core.messages import StatsReply
from core.stats import ApiSnapshot, EngineSnapshot, TokenizerSnapshot, WorkerSnapshot
from tools import status
from tools.status import View, draw, summary

GIB = 2**30
SERVER = {
    "url": "http://127.0.0.1:8000",
    "client_address": "ipc:///tmp/q/client",
    "pid": 4,
    "model": "tiny-chat",
    "engine": "tiny-chat@abc",
    "version": "0.1.0",
}
GPU = {
    "index": 0,
    "name": "H100",
    "memory_used_bytes": 3 * GIB,
    "memory_total_bytes": 80 * GIB,
    "utilization_percent": 71,
    "temperature_c": 55,
    "power_w": 412.3,
}


def recorded(ttfts: list[float], output_tokens: int, **engine: Any) -> dict[str, Any]:
    """What GET /stats answers, made by the server's own code."""
    api = ApiSnapshot(live=3, requests=20, finished=15, rejected=1, failed=0, aborted=1, errors={"queue_full": 1})
    for seconds in ttfts:
        api.ttft.observe(seconds)
        api.inter_token.observe(seconds / 10, 4)
    snapshots = {
        "scheduler": EngineSnapshot(
            running=3, waiting=2, kv_blocks_total=200, kv_blocks_used=50, kv_blocks_cached=20, steps=output_tokens // 3,
            prompt_tokens=1000, cached_tokens=250, output_tokens=output_tokens, preemptions=6, **engine,
        ),
        "tokenizer-0": TokenizerSnapshot(),
        "api-0": api,
        "worker-0": WorkerSnapshot(device="cpu, 2 threads", weights_bytes=3 * GIB, kv_bytes=GIB),
        "worker-1": WorkerSnapshot(device="cpu, 2 threads", weights_bytes=3 * GIB, kv_bytes=GIB),
    }  # fmt: skip
    packed = {name: msgspec.msgpack.encode(snapshot) for name, snapshot in snapshots.items()}
    facts: dict[str, str | int | float] = {"pid.supervisor": os.getpid(), "restarts": 1}
    stats: dict[str, Any] = json.loads(msgspec.json.encode(stats_of(StatsReply(1, "ready", packed, facts))))
    return stats


def view(stats: dict[str, Any] | None, taken_s: float, error: str = "") -> View:
    processes = [{"name": "supervisor", "pid": 4, "cpu_percent": 12.0, "memory_bytes": 50 * 2**20}]
    return View({**SERVER, "started": time.time() - 100}, stats, error, taken_s, processes if stats else [])


def drawn(*summaries: dict[str, Any], gpus: list[dict[str, Any]] | None = None) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed below
    console.print(draw(list(summaries), gpus or []))
    console.file.close()
    return console.export_text()


def test_summary_of_one_look() -> None:
    found = summary(view(recorded([0.02] * 10, 900), 50.0))
    assert (found["model"], found["state"], found["restarts"]) == ("tiny-chat", "ready", 1)
    assert found["uptime_s"] == pytest.approx(100, abs=5)
    assert (found["weights_bytes"], found["kv_bytes"], found["device"]) == (6 * GIB, 2 * GIB, "cpu, 2 threads")
    assert (found["kv_blocks_total"], found["kv_blocks_used"], found["kv_blocks_cached"]) == (200, 50, 20)
    assert (found["running"], found["waiting"], found["preemptions"]) == (3, 2, 6)
    assert found["prefix_hit_share"] == 0.25
    assert found["output_tokens_per_s"] == pytest.approx(9.0, rel=0.05)  # since the start
    assert found["requests"] == {"live": 3, "finished": 15, "rejected": 1, "failed": 0, "aborted": 1}
    assert found["errors"] == {"queue_full": 1}
    assert 0.015 < found["ttft_s"]["p50"] <= 0.02


def test_rates_and_percentiles_come_from_the_difference_of_two_looks() -> None:
    before = view(recorded([4.0] * 1000, 900), 50.0)
    after = view(recorded([4.0] * 1000 + [0.02] * 10, 990), 52.0)
    found = summary(after, before)
    assert (found["output_tokens_per_s"], found["steps_per_s"], found["prompt_tokens_per_s"]) == (45.0, 15.0, 0.0)
    assert 0.015 < found["ttft_s"]["p50"] <= found["ttft_s"]["p99"] <= 0.02  # the thousand old ones do not count
    assert 0.001 < found["inter_token_s"]["p50"] <= 0.0025
    assert summary(after)["ttft_s"]["p50"] > 3


def test_quiet_seconds_show_the_latencies_of_before() -> None:
    stats = recorded([0.02] * 10, 900)
    found = summary(view(stats, 52.0), view(stats, 50.0))
    assert found["output_tokens_per_s"] == 0.0
    assert 0.015 < found["ttft_s"]["p50"] <= 0.02


def test_idle_share_is_of_the_time_with_work() -> None:
    before = view(recorded([], 0, idle_s=1.0, busy_s=2.0), 50.0)
    after = view(recorded([], 0, idle_s=1.5, busy_s=3.5), 52.0)
    assert summary(after, before)["idle_share"] == 0.25
    assert summary(before, before)["idle_share"] is None
    assert "idle 25% of work" in drawn(summary(after, before))


def test_nothing_measured_yet() -> None:
    found = summary(view(recorded([], 0), 52.0), view(recorded([], 0), 50.0))
    assert found["ttft_s"] == {"p50": None, "p99": None}
    assert "TTFT - / - ms" in re.sub(r"[\s│]+", " ", drawn(found))


def test_a_server_that_does_not_answer() -> None:
    found = summary(view(None, 50.0, "timed out"), view(recorded([], 0), 49.0))
    assert (found["state"], found["error"]) == ("not answering", "timed out")
    assert "not answering: timed out" in drawn(found)


def test_draw_shows_servers_and_devices() -> None:
    page = drawn(summary(view(recorded([0.02] * 10, 900), 50.0)), summary(view(None, 50.0, "refused")), gpus=[GPU])
    for part in ("tiny-chat", "http://127.0.0.1:8000", "ready", "1 restarts", "weights 6.0 GiB", "25% used"):
        assert part in page
    for part in ("10% cached", "hits 25%", "running 3", "waiting 2", "preempted 6", "supervisor", "50 MiB", "refused"):
        assert part in page
    for part in ("H100", "3.0 GiB / 80.0 GiB", "71 %", "55 °C", "412 W"):
        assert part in page


def test_no_server_is_1_and_a_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("quire.find_servers", list)
    monkeypatch.setattr(status, "devices", list)
    assert status.main([]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "No Quire server is running on this machine for this user. Start one with: quire serve"
    monkeypatch.setattr(status, "devices", lambda: [GPU])
    assert status.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"servers": [], "devices": [GPU]}


def test_json_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter([view(recorded([1.0], 900), 50.0), view(recorded([1.0, 0.02], 930), 51.0)])
    monkeypatch.setattr("quire.find_servers", lambda: [{**SERVER, "started": time.time()}])
    monkeypatch.setattr(status, "devices", lambda: [GPU])
    monkeypatch.setattr(status, "look", lambda server: next(looks))
    assert status.main(["--json", "--interval", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"servers", "devices"}
    assert found["devices"] == [GPU]
    (server,) = found["servers"]
    assert server["output_tokens_per_s"] == 30.0
    assert server["ttft_s"]["p99"] <= 0.02
    assert server["processes"] == [{"name": "supervisor", "pid": 4, "cpu_percent": 12.0, "memory_bytes": 52428800}]
    assert server["client_address"] == "ipc:///tmp/q/client"


def test_look_at_a_socket_that_nobody_serves(tmp_path: Path) -> None:
    found = status.look({**SERVER, "client_address": f"ipc://{tmp_path}/gone", "started": 0.0}, timeout_s=0.3)
    assert found.stats is None
    assert "timeout_s=0.3" in found.error


def test_processes_of_dead_pids_are_left_out() -> None:
    stats = {"server": {"pid.supervisor": os.getpid(), "pid.api-0": 2**22 + 1, "restarts": 0}}
    (found,) = status.processes(stats)
    assert (found["name"], found["pid"]) == ("supervisor", os.getpid())
    assert found["memory_bytes"] > 2**20
