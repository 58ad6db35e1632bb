"""What the probe's answers mean, and a probe of this very installation."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from core.config import Config
from hw.cpu import native
from tools.doctor import software
from tools.doctor.finding import Finding
from tools.doctor.software import Device, Installed, Probe, compiler, packages

H200, A100, V100 = Device("H200", "sm_90"), Device("A100", "sm_80"), Device("V100", "sm_70")
MI250 = Device("MI250", "gfx90a")
WORKING = Installed(torch="2.11.0", cuda_build="13.0", devices=[H200], triton="3.6.0")


def of(installed: Installed, num_gpus: int = 1, **options: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in packages(installed, Config(**options), num_gpus)}


def changed(**changes: Any) -> Installed:
    return Installed(**{"torch": "2.11.0", "cuda_build": "13.0", "triton": "3.6.0", **changes})


def test_the_probe_finds_this_installation() -> None:
    with Probe() as probe:
        found = probe.result()
    assert (found.torch, found.torch_error) == (metadata.version("torch"), None)
    assert found.triton == metadata.version("triton")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "ended the process (-6): no output"),
        ("import sys; sys.exit('libcudart.so: no such file')", "(1): libcudart.so: no such file"),
        ("print('not json')", "ended the process (0)"),
        ("import time; time.sleep(60)", "more than 1 s"),
    ],
)
def test_a_broken_torch_is_an_answer(monkeypatch: pytest.MonkeyPatch, program: str, words: str) -> None:
    monkeypatch.setattr(software, "PROBE", program)
    monkeypatch.setattr(software, "TIMEOUT_S", 1.0)
    with Probe() as probe:
        assert words in (probe.result().torch_error or "")


def test_all_is_well() -> None:
    found = of(WORKING, device="cuda", quantization="fp8")
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["torch"].text == "torch 2.11.0, built for CUDA 13.0"
    assert found["cuda"].text == "torch sees H200 (sm_90)"


def test_a_machine_without_gpu_needs_neither_triton_nor_cuda() -> None:
    found = of(Installed(torch="2.11.0+cpu", triton_error="ModuleNotFoundError"), num_gpus=0)
    assert {name: finding.status for name, finding in found.items()} == {
        "torch": "ok", "triton": "skipped", "cuda": "skipped",
    }  # fmt: skip
    assert of(changed(), num_gpus=0, device="cuda")["cuda"].status == "problem"
    assert of(changed(), num_gpus=0, device="null")["cuda"].status == "skipped"


@pytest.mark.parametrize(
    ("installed", "options", "name", "words", "fix"),
    [
        (Installed(torch_error="ImportError: libcudart"), {}, "torch", "ImportError: libcudart", "pip install"),
        (changed(devices=[H200], triton=None, triton_error="no triton"), {}, "triton", "no triton", "pip install"),
        (changed(cuda_build=None), {}, "cuda", "driver shows 1 GPUs; this torch is built for CPUs", "for CUDA"),
        (changed(), {}, "cuda", "shows 1 GPUs, torch finds none", "CUDA_VISIBLE_DEVICES"),
        (changed(cuda_error="CUDA unknown error"), {}, "cuda", "CUDA unknown error", "reboot"),
        (changed(devices=[V100]), {}, "cuda", "V100 (sm_70): the kernels are made for sm_80", "--device cpu"),
        (changed(devices=[A100]), {"quantization": "fp8"}, "cuda", "no FP8 products", "leave out"),
        (changed(devices=[A100]), {"kv_dtype": "fp8"}, "cuda", "no FP8 products", "leave out"),
        (changed(devices=[MI250]), {"kv_dtype": "fp8"}, "cuda", "MI250 (gfx90a): there are no FP8", "MI300X"),
        (WORKING, {"tensor_parallel_size": 2}, "cuda", "torch sees 1 GPUs", "lower it to 1"),
    ],
)
def test_problems_have_fixes(installed: Installed, options: dict[str, Any], name: str, words: str, fix: str) -> None:
    found = of(installed, **options)[name]
    assert found.status == "problem"
    assert words in found.text
    assert fix in found.fix


def test_an_older_gpu_serves_bfloat16() -> None:
    assert of(changed(devices=[A100]))["cuda"].status == "ok"
    assert of(changed(hip_build="6.4", devices=[A100]))["torch"].status == "warning"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    for device, num_gpus, status in (
        ("auto", 0, "warning"),
        ("auto", 1, "problem"),
        ("cuda", 0, "problem"),
        ("cpu", 1, "warning"),
        ("null", 1, "skipped"),
    ):
        found = compiler(Config(device=device), num_gpus)  # type: ignore[arg-type]
        assert found.status == status
        assert status == "skipped" or "install" in found.fix


def test_triton_needs_python_s_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = compiler(Config(device="cuda"), 1)
    assert found.status == "problem"
    assert "Python.h is missing" in found.text
    (tmp_path / "Python.h").touch()
    assert compiler(Config(device="cuda"), 1).status == "ok"


def test_a_compiler_that_fails_is_slower_not_worse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "find_compiler", lambda: "/bin/false")
    found = compiler(Config(device="cpu", cache_dir=str(tmp_path)), 0)
    assert found.status == "warning"
    assert "/bin/false cannot build" in found.text


def test_the_doctor_itself_stays_light() -> None:
    code = "import sys; import tools.doctor.__main__; print('torch' in sys.modules, 'triton' in sys.modules)"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]
