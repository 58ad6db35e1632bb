"""What the driver says, and what is made of it: answers of a driver that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from core.config import Config
from tools.doctor.finding import Finding
from tools.doctor.gpus import REASONS, Driver

GIB = 2**30
CUDA = Config(device="cuda")
HEALTHY: dict[str, Any] = {
    "nvmlInit": None,
    "nvmlShutdown": None,
    "nvmlDeviceGetCount": 1,
    "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlSystemGetDriverVersion": "580.65",
    "nvmlSystemGetCudaDriverVersion": 13000,
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=GIB, total=140 * GIB),
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=77)],
    "nvmlDeviceGetCurrentClocksThrottleReasons": pynvml.nvmlClocksThrottleReasonGpuIdle,
    "nvmlDeviceGetClockInfo": 345,
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetTemperature": 31,
    "nvmlDeviceGetPowerManagementLimit": 700_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetRemappedRows": (0, 0, False, False),
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetPersistenceMode": pynvml.NVML_FEATURE_ENABLED,
    "nvmlDeviceGetComputeMode": pynvml.NVML_COMPUTEMODE_DEFAULT,
}


def check(
    monkeypatch: pytest.MonkeyPatch, config: Config = CUDA, cuda_build: str | None = "13.0", **answers: Any
) -> dict[str, Finding]:
    """The findings by name when the driver gives HEALTHY's answers, except for `answers`. Errors are raised."""
    for name, answer in (HEALTHY | answers).items():
        assert hasattr(pynvml, name)

        def reply(*_: Any, answer: Any = answer) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(pynvml, name, reply)
    with Driver() as driver:
        return {finding.name: finding for finding in driver.check(config, cuda_build)}


def test_a_healthy_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(monkeypatch)
    assert set(found) == {"driver", "gpu 0"}
    assert found["driver"].text == "NVIDIA driver 580.65, for CUDA up to 13.0, 1 GPUs"
    assert found["gpu 0"].text == "NVIDIA H200, 140.0 GiB, not throttled, up to 1980 MHz, 31 °C"
    assert {finding.status for finding in found.values()} == {"ok"}


def test_every_gpu_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(check(monkeypatch, nvmlDeviceGetCount=3)) == {"driver", "gpu 0", "gpu 1", "gpu 2"}


@pytest.mark.parametrize(
    ("answers", "name", "status", "words", "fix"),
    [
        (
            {"nvmlDeviceGetMemoryInfo": SimpleNamespace(used=30 * GIB, total=140 * GIB)},
            "gpu 0 memory", "warning", "30.0 of 140.0 GiB are in use by process 77", "CUDA_VISIBLE_DEVICES",
        ),
        (
            {"nvmlDeviceGetPowerManagementLimit": 350_000},
            "gpu 0 power", "warning", "is 350 W, by default 700 W", "--power-limit=700",
        ),
        ({"nvmlDeviceGetTotalEccErrors": 2}, "gpu 0 errors", "problem", "2 uncorrected", "reset"),
        ({"nvmlDeviceGetRemappedRows": (1, 0, True, False)}, "gpu 0 errors", "problem", "wait for a reset", "reset"),
        ({"nvmlDeviceGetRemappedRows": (1, 0, False, True)}, "gpu 0 errors", "problem", "could not", "replace"),
        ({"nvmlDeviceGetMigMode": [1, 1]}, "gpu 0 mode", "warning", "MIG", "multi-instance-gpu=0"),
        (
            {"nvmlDeviceGetComputeMode": pynvml.NVML_COMPUTEMODE_PROHIBITED},
            "gpu 0 mode", "problem", "refuses", "compute-mode=0",
        ),
        (
            {"nvmlDeviceGetPersistenceMode": pynvml.NVML_FEATURE_DISABLED},
            "gpu 0 mode", "warning", "persistence", "persistence-mode=1",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_fix(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], name: str, status: str, words: str, fix: str
) -> None:
    found = check(monkeypatch, **answers)
    assert set(found) == {"driver", name}
    assert found[name].status == status
    assert words in found[name].text
    assert fix in found[name].fix


@pytest.mark.parametrize("bit", REASONS)
def test_throttling(monkeypatch: pytest.MonkeyPatch, bit: int) -> None:
    name, faulty, fix = REASONS[bit]
    found = check(monkeypatch, nvmlDeviceGetCurrentClocksThrottleReasons=bit)["gpu 0 clocks"]
    assert found.text == f"throttled: {name}; 345 of 1980 MHz, 31 °C"
    assert found.status == ("problem" if faulty else "warning")
    assert found.fix == fix


def test_the_driver_must_know_torch_s_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    old = check(monkeypatch, nvmlSystemGetCudaDriverVersion=12080)["driver"]
    assert old.status == "problem"
    assert old.text.endswith("for CUDA up to 12.8, 1 GPUs; torch is built for CUDA 13.0")
    assert "CUDA 12" in old.fix
    # Minor versions of one major are compatible.
    assert check(monkeypatch, cuda_build="12.9", nvmlSystemGetCudaDriverVersion=12080)["driver"].status == "ok"
    assert check(monkeypatch, cuda_build=None, nvmlSystemGetCudaDriverVersion=12080)["driver"].status == "ok"


def test_answers_that_a_device_does_not_have_are_no_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = {
        name: pynvml.NVMLError_NotSupported()
        for name in HEALTHY
        if name.startswith("nvmlDeviceGet") and name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")
    }
    found = check(monkeypatch, **silent)
    assert {name: finding.status for name, finding in found.items()} == {"driver": "ok", "gpu 0": "ok"}


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = pynvml.NVMLError_LibraryNotFound()
    for device, status in (("auto", "skipped"), ("cuda", "problem"), ("cpu", "skipped")):
        found = check(monkeypatch, Config(device=device), nvmlInit=missing)  # type: ignore[arg-type]
        assert {name: finding.status for name, finding in found.items()} == {"driver": status}
    assert "--gpus all" in check(monkeypatch, nvmlInit=missing)["driver"].fix
