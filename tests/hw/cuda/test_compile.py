"""Every kernel compiled for sm_90 and gfx942 without a GPU: the instructions that matter are there, nothing spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent


def compiled(target: str, cache: Path) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(FOLDER.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(FOLDER / "compile_only.py"), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts: list[dict[str, Any]] = json.loads(done.stdout)
    return facts


@pytest.mark.timeout(300)
def test_hopper(tmp_path: Path) -> None:
    for fact in compiled("cuda", tmp_path):
        assert fact["spills"] == 0 and fact["stack"] <= 16, fact  # a predicate or two may lie there
        if fact["name"] in ("fp8_linear_kernel", "attention_decode_fp8_kernel"):
            assert fact["fp8_wgmma"] > 0, fact
        if fact["name"] == "attention_prefill_kernel":
            assert fact["wgmma"] > 0, fact
        if fact["name"] in (
            "fp8_linear_kernel",
            "attention_prefill_kernel",
            "attention_decode_kernel",
            "attention_decode_fp8_kernel",
        ):
            assert fact["async_copies"] > 0, fact


@pytest.mark.timeout(300)
def test_mi300(tmp_path: Path) -> None:
    for fact in compiled("hip", tmp_path):
        if fact["name"] in (
            "fp8_linear_kernel",
            "attention_prefill_kernel",
            "attention_decode_kernel",
            "attention_decode_fp8_kernel",
        ):
            assert fact["matrix"] > 0, fact
