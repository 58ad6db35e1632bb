"""Every kernel compiled for every architecture of hw/devices.py without a GPU: the instructions that matter are there,
nothing spills that should not, and what a program takes of shared memory is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hw.devices import CUDA, ROCM

FOLDER = Path(__file__).parent
Facts = list[dict[str, Any]]
FP8_KERNELS = ("fp8_linear_kernel", "attention_decode_fp8_kernel")
PRODUCT_KERNELS = (*FP8_KERNELS, "attention_prefill_kernel", "attention_decode_kernel")
FP8_INSTRUCTION = {"sm_89": "fp8_mma", "sm_90": "fp8_wgmma", "sm_100": "fp8_tcgen05", "sm_120": "fp8_mma"}
OTHERS = sorted(CUDA.keys() - {"sm_90"})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Facts]:
    """Architecture -> facts of all kernels, compiled once."""

    @cache
    def compile_for(architecture: str) -> Facts:
        folder = tmp_path_factory.mktemp(architecture)
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(FOLDER.parents[2])}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(FOLDER / "compile_only.py"), architecture]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        facts: Facts = json.loads(done.stdout)
        return facts

    return compile_for


@pytest.mark.timeout(300)
def test_hopper(compiled: Callable[[str], Facts]) -> None:
    for fact in compiled("sm_90"):
        assert fact["spills"] == 0, fact
        assert fact["stack"] <= 16, fact  # a predicate or two may lie there
        assert fact["shared"] <= CUDA["sm_90"].shared_bytes, fact
        if fact["name"] in FP8_KERNELS:
            assert fact["fp8_wgmma"] > 0, fact
        if fact["name"] == "attention_prefill_kernel":
            assert fact["wgmma"] > 0, fact
        if fact["name"] in PRODUCT_KERNELS:
            assert fact["async_copies"] > 0, fact


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("architecture", OTHERS)
def test_other_nvidia(compiled: Callable[[str], Facts], architecture: str) -> None:
    facts = compiled(architecture)
    device = CUDA[architecture]
    for fact in facts:
        # Tiles are Hopper's: with the older instructions some kernels put a few of their 255 registers on the stack.
        assert fact["stack"] <= 128, fact
        assert fact["shared"] <= device.shared_bytes, fact
        if fact["name"] in PRODUCT_KERNELS:
            assert fact["mma"] + fact["tcgen05"] > 0, fact
        if fact["name"] in FP8_KERNELS:
            assert fact[FP8_INSTRUCTION[architecture]] > 0, fact
    waits = sum(fact["pdl"] for fact in facts)
    assert (waits > 0) == device.dependent_launches
    names = {fact["name"] for fact in facts}
    assert set(FP8_KERNELS) & names == (set(FP8_KERNELS) if device.fp8 else set())


@pytest.mark.timeout(300)
def test_mi300(compiled: Callable[[str], Facts]) -> None:
    for fact in compiled("gfx942"):
        assert fact["spills"] <= 8, fact
        if fact["name"] in PRODUCT_KERNELS:
            assert fact["matrix"] > 0, fact
        if fact["name"] in FP8_KERNELS:
            assert fact["fp8_matrix"] == fact["matrix"], fact


@pytest.mark.timeout(300)
def test_mi300_has_the_shared_memory(compiled: Callable[[str], Facts]) -> None:
    facts = compiled("gfx942")
    too_large = {(fact["name"], fact["shared"]) for fact in facts if fact["shared"] > ROCM["gfx942"].shared_bytes}
    assert not too_large


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mi250(compiled: Callable[[str], Facts]) -> None:
    for fact in compiled("gfx90a"):
        assert fact["spills"] == 0, fact
        assert fact["shared"] <= ROCM["gfx90a"].shared_bytes, fact
        if fact["name"] in PRODUCT_KERNELS:
            assert fact["matrix"] > 0, fact
