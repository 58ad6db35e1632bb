"""`quire plan` as its users call it: memory, what would fit, money, and the shape of --json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from tools.plan.__main__ import main
from tools.plan.cost import Prices, cost_of
from tools.plan.draw import draw
from tools.plan.gpus import Attainable, Catalogue
from tools.plan.limit import Load
from tools.plan.memory import RESERVED_BYTES
from tools.plan.model import KVStored
from tools.plan.report import PlanReport, Report

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA_70B | changes))


def report(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Report:
    assert main([*argv, "--json"]) == code
    return msgspec.json.decode(capsys.readouterr().out, type=Report)


def only(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> PlanReport:
    (plan,) = report(capsys, *argv, code=code).plans
    return plan


def test_memory_is_the_worker_s_own_arithmetic(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--gpu", "h200", "--num", "2", "--kv-dtype", "fp8", "--gpu-memory-utilization", "0.8"]
    memory = only(capsys, *argv).memory
    assert memory is not None
    per_token = 2 * 80 * 4 * 128  # K and V, layers, half of the heads, head_dim, one byte
    assert memory.kv_bytes_per_token == per_token
    free = Catalogue.read().find("h200").memory_bytes - RESERVED_BYTES - memory.weights_bytes
    blocks = int(free * 0.8) // (16 * per_token)
    assert memory.kv_tokens == blocks * 16
    assert memory.kv_bytes == blocks * 16 * per_token
    assert memory.sequences == (blocks - 1) // (768 // 16)


def test_windows_hold_a_sequence_in_fewer_blocks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--gpu", "b200", "--num", "8", "--prompt-tokens", "30000", "--output-tokens", "1000"]
    change(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    full = only(capsys, *argv).memory
    change(folder, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=4096)
    sliding = only(capsys, *argv).memory
    assert full is not None
    assert sliding is not None
    assert full.kv_tokens == sliding.kv_tokens
    assert sliding.sequences == (sliding.kv_tokens // 16 - 1) // ((4096 + 2048) // 16) > 4 * full.sequences


def test_what_does_not_fit_says_why_and_what_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = only(capsys, str(folder), "--gpu", "h100", "--num", "1", code=1)
    assert plan.status == "too_small"
    assert plan.reason == "131.4 GiB of weights per GPU do not fit into 79.6 GiB"
    assert plan.instead[0] == "1 x H100 80 GB with --quantization fp8 --kv-dtype fp8"
    assert (plan.limit, plan.expected, plan.command) == (None, None, "")
    # What is advised holds.
    argv = [str(folder), "--gpu", "h100", "--num", "1", "--quantization", "fp8", "--kv-dtype", "fp8"]
    assert only(capsys, *argv).status == "fits"


def test_fewer_at_once_wait_for_their_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--gpu", "h200", "--num", "1", "--kv-dtype", "fp8", "--concurrency"]
    plan, less = only(capsys, *argv, "200", code=1), only(capsys, *argv, "20")
    assert (plan.status, less.status) == ("fewer", "fits")
    assert plan.expected is not None
    assert plan.memory is not None
    assert less.expected is not None
    assert plan.expected.concurrency == plan.memory.sequences < 200
    assert plan.reason == f"{plan.memory.sequences} of 200 sequences at once; the others wait"
    # Little's law: those who wait, divided by the requests that end per second.
    waited = (200 - plan.memory.sequences) / (plan.expected.tokens_per_s / 256)
    assert plan.expected.ttft_s > waited > 10 * less.expected.ttft_s


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "a100", "--num", "4", "--quantization", "fp8"], "the A100 80 GB has no FP8"),
        (["--gpu", "a100", "--num", "4", "--kv-dtype", "fp8"], "the A100 80 GB has no FP8"),
        (["--gpu", "h200", "--num", "3"], "64 cannot be divided among 3 ranks"),
    ],
)
def test_what_is_impossible(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    plan = only(capsys, str(folder), *options, code=1)
    assert plan.status == "impossible"
    assert words in plan.reason
    assert plan.memory is None


def test_a_ready_made_fp8_checkpoint_is_used_where_there_is_fp8(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    found = report(capsys, str(folder), "--gpu", "a100,h100", "--num", "4")
    assert [plan.quantization for plan in found.plans] == ["none", "fp8"]
    assert "--quantization" not in found.plans[1].command  # the loader sees for itself


def test_the_command_repeats_what_was_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--gpu", "b200", "--num", "2", "--quantization", "fp8", "--kv-dtype", "fp8"]
    plan = only(capsys, *argv, "--concurrency", "300", "--gpu-memory-utilization", "0.85")
    assert plan.command == (
        f"quire serve {folder} --quantization fp8 --kv-dtype fp8 --tensor-parallel-size 2 --max-num-seqs 300 "
        "--gpu-memory-utilization 0.85"
    )
    assert only(capsys, "tiny-chat", "--gpu", "mi300x", "--num", "1").command == ""  # not served


def test_expected_is_the_limit_times_the_efficiency(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = only(capsys, str(folder), "--gpu", "h200", "--num", "1", "--quantization", "fp8", "--concurrency", "16")
    assert plan.expected is not None
    assert plan.limit is not None
    assert plan.measured
    assert plan.expected.tokens_per_s == pytest.approx(plan.limit.tokens_per_s * plan.expected.efficiency)
    assert plan.expected.tokens_per_s_low < plan.expected.tokens_per_s < plan.expected.tokens_per_s_high
    assert plan.expected.tokens_per_s_high <= plan.limit.tokens_per_s
    assert sum(plan.limit.seconds.values()) == pytest.approx(plan.limit.step_s)
    # Little's law holds between the three.
    times = plan.expected.ttft_s + 255 * (plan.expected.inter_token_s or 0)
    assert 16 * 256 / times == pytest.approx(plan.expected.tokens_per_s)


def test_one_token_answers_have_no_inter_token_time(capsys: pytest.CaptureFixture[str]) -> None:
    plan = only(capsys, "tiny-chat", "--gpu", "h200", "--num", "1", "--output-tokens", "1")
    assert plan.expected is not None
    assert plan.expected.inter_token_s is None


def test_costs_by_hand() -> None:
    cost = cost_of(Prices(3.6, api_output=4.0, api_prompt=1.0), 2, 1000.0, Load(8, 300, 100))
    assert cost.per_hour == 7.2
    assert cost.per_million_output_tokens == pytest.approx(7.2 / 3.6)  # 3.6 million tokens an hour
    assert cost.per_million_tokens == pytest.approx(0.5)
    assert cost.most_tokens_per_day == pytest.approx(4000 * 86400)
    assert cost.api_per_million_tokens == pytest.approx((3 * 1.0 + 4.0) / 4)
    assert cost.break_even_tokens_per_day == pytest.approx(7.2 * 24 / 1.75 * 1e6)
    assert cost.break_even_requests_per_day == pytest.approx(7.2 * 24 / 1.75 * 1e6 / 400)
    cheap = cost_of(Prices(3.6, api_output=0.4), 2, 1000.0, Load(8, 300, 100))
    assert (cheap.api_per_million_tokens, cheap.break_even_tokens_per_day) == (0.4, None)
    assert cost_of(Prices(3.6), 2, 1000.0, Load(8, 300, 100)).api_per_million_tokens is None


def test_prices_of_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tiny-chat", "--gpu", "h200,h100,l40s", "--num", "2", "--price-per-hour", "h200=3.5,L40S=0.9"]
    found = report(capsys, *argv, "--api-price-per-million", "1")
    assert [plan.cost and plan.cost.per_hour for plan in found.plans] == [7.0, None, 1.8]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "h300"], ["--gpu", "'h300'", "h200"]),
        (["--num", "0"], ["--num", "'0'"]),
        (["--num", "two"], ["--num", "'two'"]),
        (["--prompt-tokens", "2000"], ["--prompt-tokens", "2048 positions of tiny-chat"]),
        (["--price-per-hour", "cheap"], ["--price-per-hour", "'cheap'"]),
        (["--gpu", "h200", "--price-per-hour", "h100=2"], ["--price-per-hour", "'h100'"]),
        (["--api-price-per-million", "2"], ["--price-per-hour"]),
        (["--price-per-hour", "2", "--api-prompt-price-per-million", "2"], ["--api-price-per-million"]),
    ],
)
def test_wrong_usage_is_2_and_names_the_option(
    options: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tiny-chat", *options]) == 2
    out, err = capsys.readouterr()
    assert not out
    for word in words:
        assert word in err


def test_models_that_are_not_served_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, model_type="gpt2")
    assert main([str(folder)]) == 2
    assert "'gpt2' is not supported; supported are llama" in capsys.readouterr().err
    assert main([]) == 2
    assert "MODEL" in capsys.readouterr().err


def test_the_schema_describes_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json-schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert main(["tiny-chat", "--gpu", "h200", "--price-per-hour", "3", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    definitions = schema["$defs"]
    assert set(definitions["Report"]["properties"]) == set(answer)
    for name, found in (
        ("PlanReport", answer["plans"][0]),
        ("MemoryReport", answer["plans"][0]["memory"]),
        ("ExpectedReport", answer["plans"][0]["expected"]),
        ("Cost", answer["plans"][0]["cost"]),
        ("FitReport", answer["fit"]),
    ):
        assert set(found) == set(definitions[name]["properties"])


def test_the_table_shows_what_the_report_has(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(folder), "--price-per-hour", "3.5", "--api-price-per-million", "0.6"]
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed below
    console.print(draw(report(capsys, *argv)))
    console.print(draw(report(capsys, *argv, "--gpu", "h200", "--num", "2")))
    console.file.close()
    page = console.export_text()
    for part in ("70.55 G parameters", "131.4 GiB", "67.7 GiB", "320.0 KiB", "8 x MI300X", "too small", "fewer"):
        assert part in page
    for part in ("Would take it: 1 x H100", "never", "280.0 M", "A step at the limit", "Start it: quire serve"):
        assert part in page
    assert "Only 1 x H200 has been measured" in page
    assert "nothing of Quire has run on AMD" in page


def test_every_figure_has_a_source() -> None:
    catalogue = Catalogue.read()
    assert list(catalogue.gpus) == ["a100", "h100", "h200", "b200", "l40s", "mi300x"]
    for gpu in catalogue.gpus.values():
        figures = {"memory_mib", "bandwidth_tbps", "bf16_tflops", "link_gbps"}
        assert set(gpu.source) == figures | ({"fp8_tflops"} if gpu.fp8_tflops else set())
        assert all(len(text) > 20 for text in gpu.source.values())
    for name in msgspec.structs.fields(Attainable):
        assert 0.5 < getattr(catalogue.attainable, name.name) < 1


def test_the_cache_s_types_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    for stored, name in ((KVStored.bfloat16, "bfloat16"), (KVStored.fp8, "float8_e4m3fn")):
        assert stored.itemsize == getattr(torch, name).itemsize


def test_it_needs_no_torch() -> None:
    code = "import sys; from tools.cli import main; main(['plan', 'tiny-chat']); print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = {name.strip(" '").partition(".")[0] for name in out.splitlines()[-1].strip("[]").split(",")}
    assert loaded.isdisjoint({"torch", "triton", "transformers", "starlette", "huggingface_hub"})
