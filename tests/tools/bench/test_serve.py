"""`quire bench serve` against a fake server, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.bench.fake_server import refusal, serving
from tools.bench import __main__ as bench
from tools.bench.cpu_shares import CpuShares
from tools.bench.elsewhere import Elsewhere
from tools.bench.engine_options import engine_options
from tools.bench.serve import main, shares_table

TOKENIZER = str(Path(__file__).parents[3] / "models/builtin/tiny-chat/tokenizer.json")
SHORT = ["--model", "m", "--prompt-tokens", "30", "--output-tokens", "3", "--warmup", "1"]


def test_json_has_settings_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as fake:
        code = main(["--url", fake.url + "/v1", *SHORT, "--concurrency", "1,4", "--json", "--key", "secret"])
    said = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [result["concurrency"] for result in said["results"]] == [1, 4]
    assert [result["num_ok"] for result in said["results"]] == [16, 32]
    assert all(result["wrong_lengths"] == 0 for result in said["results"])
    assert said["results"][0]["tokens_per_chunk"] == 1.0
    assert said["settings"]["key"] is None
    assert said["versions"]["Python"]
    assert said["date"]


def test_points_share_no_prompts() -> None:
    with serving() as fake:
        main(["--url", fake.url, *SHORT, "--concurrency", "2,2", "--seed", "5"])
        prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == len(prompts) == 1 + 16 + 16


def test_chat_prompts_leave_room_for_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(chat_overhead=9) as fake:
        code = main(
            ["--url", fake.url, *SHORT, "--concurrency", "2", "--chat", "--tokenizer", TOKENIZER, "--requests", "8"]
        )
    said = capsys.readouterr().out
    assert code == 0
    assert "other lengths" not in said  # the server counted 30 tokens each time, its own 9 among them
    assert "| 2 |" in said


def test_errors_are_shown_and_told_by_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(fail=lambda body: refusal(429, "queue_full")) as fake:
        code = main(["--url", fake.url, *SHORT, "--concurrency", "2"])
    assert code == 1
    assert "queue_full: 16" in capsys.readouterr().out


def test_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as fake:
        assert main(["--url", fake.url, *SHORT, "--rate", "200,400", "--requests", "40"]) == 0
    said = capsys.readouterr().out
    assert "| 200/s |" in said
    assert "| 400/s |" in said


def test_nobody_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", "http://127.0.0.1:9", "--concurrency", "1"]) == 2
    assert "pass --model" in capsys.readouterr().err


def test_cpu_share_of_a_process_tree() -> None:
    shares = CpuShares(os.getpid())
    sum(number * number for number in range(2_000_000))
    used = shares.shares(seconds=1.0)
    assert used["supervisor"] > 0.01
    text = shares_table([{**RESULT, "cpu_shares": used}])
    assert text.startswith("| C | supervisor |")


RESULT = {
    "rate": None,
    "concurrency": 1,
    "output_tokens_per_s": 1.0,
    "requests_per_s": 1.0,
    **{key: {"p50": 1.0, "p99": 1.0} for key in ("ttft_s", "tpot_s", "inter_token_s", "end_to_end_s")},
    "num_ok": 1,
    "errors": {},
    "client_shares": [0.1],
}


def test_engine_options() -> None:
    assert engine_options(["--dtype", "float32", "--no-prefix-caching", "--kv-gib=2", "--strict-fields"]) == {
        "dtype": "float32",
        "prefix_caching": False,
        "kv_gib": "2",
        "strict_fields": True,
    }


def test_every_bench_has_a_main(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    said = capsys.readouterr().out
    folder = Path(bench.__file__).parent
    for name in bench.BENCHES:
        assert f"  {name} " in said
        assert "def main(" in (folder / f"{'against_transformers' if name == 'transformers' else name}.py").read_text()
    assert bench.main(["nonsense"]) == 2


def test_own_work_and_that_of_ended_children_is_not_elsewhere() -> None:
    elsewhere = Elsewhere()
    began = sum(os.times()[:4])
    subprocess.run([sys.executable, "-c", "sum(n * n for n in range(3_000_000))"], check=True)
    sum(number * number for number in range(1_000_000))
    assert elsewhere._ours() - began > 0.1  # seconds of CPU, the child's among them
    assert 0.0 <= elsewhere.share() <= 1.0
