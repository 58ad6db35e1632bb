"""What runs on which GPU, and what is refused there in which words. None is needed: torch is told that it has one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.errors import QuireError
from hw.backend import Backend
from hw.cuda import backend as cuda_backend
from hw.devices import CUDA, PRODUCTS, ROCM, ideal_step_tokens
from hw.quant.scheme import make_scheme
from hw.select import select
from models.runtime.build import dtype_of

GPUS = Path(__file__).parents[2] / "tools/plan/gpus.toml"


@dataclass(frozen=True)
class Gpu:
    """A device as torch shows it."""

    name: str
    major: int
    minor: int
    total_memory: int
    gcnArchName: str = ""

    @property
    def capability(self) -> tuple[int, int]:
        return self.major, self.minor


MIB = 1 << 20
A100 = Gpu("NVIDIA A100-SXM4-80GB", 8, 0, 81920 * MIB)
A100_40 = Gpu("NVIDIA A100-SXM4-40GB", 8, 0, 40960 * MIB)
L40S = Gpu("NVIDIA L40S", 8, 9, 46068 * MIB)
H100 = Gpu("NVIDIA H100 80GB HBM3", 9, 0, 81559 * MIB)
H200 = Gpu("NVIDIA H200", 9, 0, 143771 * MIB)
B200 = Gpu("NVIDIA B200", 10, 0, 183359 * MIB)
MI300X = Gpu("AMD Instinct MI300X", 9, 4, 196592 * MIB, "gfx942:sramecc+:xnack-")
MI250 = Gpu("AMD Instinct MI250", 9, 0, 65520 * MIB, "gfx90a:sramecc+:xnack-")

BF16, BOTH = ("bfloat16",), ("bfloat16", "float32")
FN, FNUZ = "float8_e4m3fn", "float8_e4m3fnuz"
# device: backend, dtypes, kv_dtypes, schemes, FP8 format, dependent launches, ideal_step_tokens, compiled for
TABLE: list[tuple[Gpu, str, tuple[str, ...], tuple[str, ...], tuple[str, ...], str | None, bool, int, Any]] = [
    (A100, "cuda", BOTH, BOTH, ("none",), None, False, 128, ("cuda", 80, 32)),
    (A100_40, "cuda", BOTH, BOTH, ("none",), None, False, 160, ("cuda", 80, 32)),
    (L40S, "cuda", BOTH, (*BF16, "fp8"), ("none", "fp8"), FN, False, 336, ("cuda", 89, 32)),
    (H100, "cuda", BOTH, (*BOTH, "fp8"), ("none", "fp8"), FN, True, 240, ("cuda", 90, 32)),
    (H200, "cuda", BOTH, (*BOTH, "fp8"), ("none", "fp8"), FN, True, 160, ("cuda", 90, 32)),
    (B200, "cuda", BOTH, (*BOTH, "fp8"), ("none", "fp8"), FN, True, 240, ("cuda", 100, 32)),
    (MI300X, "rocm", BF16, (*BF16, "fp8"), ("none", "fp8"), FNUZ, False, 192, ("hip", "gfx942", 64)),
    (MI250, "rocm", BF16, BF16, ("none",), None, False, 96, ("hip", "gfx90a", 64)),
]  # fmt: skip
Install = Callable[..., None]


class Ops:
    """In place of CudaOps, which puts a tensor on the device."""

    def __init__(self, device: torch.device, pdl: bool) -> None:
        self.pdl = pdl


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give torch some devices; AMD's come with a torch for ROCm."""

    def give(*gpus: Gpu) -> None:
        monkeypatch.setattr(torch.version, "hip", "6.4" if gpus[0].gcnArchName else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
        monkeypatch.setattr(cuda_backend, "CudaOps", Ops)
        monkeypatch.setattr(cuda_backend, "INTERPRET", SimpleNamespace(value=False))

    return give


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].name)
def test_what_runs(install: Install, row: Any) -> None:
    gpu, name, dtypes, kv_dtypes, schemes, fp8, pdl, tokens, target = row
    install(gpu)
    for device in ("auto", name):
        backend: Any = select(device)
        facts = backend.capabilities
        assert (facts.name, facts.device_name, facts.memory_bytes) == (name, gpu.name, gpu.total_memory)
        assert (facts.dtypes, facts.kv_dtypes, facts.schemes, facts.fp8) == (dtypes, kv_dtypes, schemes, fp8)
        assert (facts.graphs, facts.block_size, facts.ideal_step_tokens) == (True, 32, tokens)
        assert backend.ops.pdl == pdl
        compiled_for = backend._target
        assert (compiled_for.backend, compiled_for.arch, compiled_for.warp_size) == target
        assert make_scheme("none", facts).name == "none"
        assert dtype_of("auto", "dtype", facts.dtypes, facts) == torch.bfloat16
        if fp8 is not None:
            values = make_scheme("fp8", facts).pack(torch.ones(16, 16))[0]
            assert values.dtype == dtype_of("fp8", "kv_dtype", facts.kv_dtypes, facts) == getattr(torch, fp8)


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (A100, "NVIDIA A100-SXM4-80GB (compute capability 8.0), which has no FP8 products"),
        (MI250, "AMD Instinct MI250 (gfx90a), which has no FP8 products"),
    ],
    ids=["A100", "MI250"],
)
def test_fp8_is_refused_where_there_is_none(install: Install, gpu: Gpu, words: str) -> None:
    install(gpu)
    facts = select("auto").capabilities
    fix = "; L40S, H100, H200, B200, MI300X have. Here choose "
    with pytest.raises(QuireError) as caught:
        make_scheme("fp8", facts)
    assert (caught.value.code, caught.value.param) == ("invalid_config", "quantization")
    assert caught.value.message == f"--quantization: 'fp8' is not available on {words}{fix}none"
    with pytest.raises(QuireError) as caught:
        dtype_of("fp8", "kv_dtype", facts.kv_dtypes, facts)
    assert (caught.value.code, caught.value.param) == ("invalid_config", "kv_dtype")
    assert caught.value.message == f"--kv-dtype: 'fp8' is not available on {words}{fix}{', '.join(facts.kv_dtypes)}"


def refused(gpu: Gpu, device: str) -> str:
    with pytest.raises(QuireError) as caught:
        select(device)
    assert (caught.value.code, caught.value.param) == ("invalid_config", "device")
    return caught.value.message


@pytest.mark.parametrize(
    ("gpu", "device", "words"),
    [
        (Gpu("Tesla V100", 7, 0, 1 << 35), "cuda", "the kernels are not made for Tesla V100 (sm_70), only for sm_80"),
        (Gpu("AMD MI100", 9, 0, 1 << 35, "gfx908:xnack-"), "rocm", "AMD MI100 (gfx908), only for gfx90a, gfx942"),
        (Gpu("AMD MI355X", 9, 5, 1 << 38, "gfx950"), "rocm", "AMD MI355X (gfx950), only for gfx90a, gfx942"),
        (H200, "rocm", "'rocm' cannot be used: this torch is not built for ROCm"),
        (MI300X, "cuda", "'cuda' cannot be used: this torch is built for ROCm"),
    ],
)  # fmt: skip
def test_other_devices_are_refused_by_name(install: Install, gpu: Gpu, device: str, words: str) -> None:
    install(gpu)
    message = refused(gpu, device)
    assert words in message
    assert message.startswith(f"--device: '{device}' cannot be used: ")


@pytest.mark.parametrize("gpu", [Gpu("Tesla V100", 7, 0, 1 << 35), Gpu("AMD MI100", 9, 0, 1 << 35, "gfx908")])
def test_auto_serves_on_the_cpu_instead(install: Install, gpu: Gpu) -> None:
    install(gpu)
    backend: Backend = select("auto")
    assert backend.capabilities.name == "cpu"


def test_a_rank_with_another_device_is_refused_by_name(install: Install) -> None:
    install(H200, Gpu("Tesla T4", 7, 5, 1 << 34))
    assert select("cuda", 0).capabilities.device_name == "NVIDIA H200"
    with pytest.raises(QuireError, match=r"Tesla T4 \(sm_75\)"):
        select("cuda", 1)


def test_pacing_of_an_unknown_product_is_that_of_its_nearest() -> None:
    assert ideal_step_tokens("sm_90", 96 << 30) == ideal_step_tokens("sm_90", 80 << 30) == 240
    assert ideal_step_tokens("sm_86", 24 << 30) == 160, "no product of it is known"


def test_peaks_are_those_of_the_plan() -> None:
    """tools/plan/gpus.toml has the source of each figure."""
    catalogue = tomllib.loads(GPUS.read_text())
    named = {row.name.partition(" ")[0].lower(): row for row in PRODUCTS if row.name != "A100 40 GB"}
    for key, gpu in catalogue["gpus"].items():
        row = named.pop(key)
        assert (row.bf16_tflops, row.bandwidth_tbps) == (gpu["bf16_tflops"], gpu["bandwidth_tbps"])
        assert abs(row.memory_gib * 1024 - gpu["memory_mib"]) < 0.07 * gpu["memory_mib"]
        assert ("fp8_tflops" in gpu) == ((CUDA | ROCM)[row.architecture].fp8 is not None)
    assert set(named) == {"mi250"}
