"""Gpus: what the NVIDIA driver says of itself and of each device, through nvidia-ml-py. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml

from core.config import Config
from tools.doctor.finding import Finding, Status

# Why clocks are lower than they could be: bit -> (name, whether the machine has a fault, what to do).
REASONS: dict[int, tuple[str, bool, str]] = {
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: ("too hot (hardware)", True, "look after its cooling"),
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: ("too hot (driver)", True, "look after its cooling"),
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: (
        "power brake",
        True,
        "the machine's power supply asks for less: look after it",
    ),
    pynvml.nvmlClocksThrottleReasonHwSlowdown: ("hardware slowdown", True, "look after cooling and power supply"),
    pynvml.nvmlClocksThrottleReasonSwPowerCap: (
        "power limit",
        False,
        "normal under full load; else raise it: nvidia-smi --power-limit",
    ),
    pynvml.nvmlClocksThrottleReasonApplicationsClocksSetting: (
        "application clocks are set",
        False,
        "give the default back: nvidia-smi --reset-applications-clocks",
    ),
    pynvml.nvmlClocksThrottleReasonSyncBoost: (
        "synchronised with another GPU",
        False,
        "nvidia-smi -q -d CLOCK tells more",
    ),
}
BUSY_SHARE = 0.05  # of a device's memory, in others' use


class Driver:
    """NVML between `with`: `error` says why it cannot be used, and then there are no devices."""

    def __init__(self) -> None:
        self.error: str | None = None
        self.num_gpus = 0

    def __enter__(self) -> Driver:
        try:
            pynvml.nvmlInit()
            self.num_gpus = int(pynvml.nvmlDeviceGetCount())
        except pynvml.NVMLError as error:
            self.error = str(error)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.error is None:
            pynvml.nvmlShutdown()

    def check(self, config: Config, cuda_build: str | None) -> list[Finding]:
        """The driver and its devices. cuda_build: CUDA version that torch is built for."""
        if config.device in ("cpu", "null"):
            return [Finding("driver", "skipped", f"--device {config.device} needs none")]
        if self.error is not None:
            return [self._missing(config)]
        findings = [self._version(cuda_build)]
        for index in range(self.num_gpus):
            findings += _device(index, pynvml.nvmlDeviceGetHandleByIndex(index))
        return findings

    def _missing(self, config: Config) -> Finding:
        if config.device == "cuda":
            fix = "install the NVIDIA driver; in a container, start it with --gpus all"
            return Finding("driver", "problem", f"the NVIDIA driver cannot be used: {self.error}", fix)
        return Finding("driver", "skipped", f"no NVIDIA driver ({self.error})")

    def _version(self, cuda_build: str | None) -> Finding:
        version = _text(_ask(pynvml.nvmlSystemGetDriverVersion))
        number = _ask(pynvml.nvmlSystemGetCudaDriverVersion) or 0
        text = f"NVIDIA driver {version}, for CUDA up to {number // 1000}.{number % 1000 // 10}, {self.num_gpus} GPUs"
        # Within one major version of CUDA, an older driver runs what is built for a newer minor one.
        if cuda_build is not None and number and number // 1000 < int(cuda_build.partition(".")[0]):
            fix = f"update the driver, or install a torch built for CUDA {number // 1000}"
            return Finding("driver", "problem", f"{text}; torch is built for CUDA {cuda_build}", fix)
        return Finding("driver", "ok", text)


def _device(index: int, handle: Any) -> list[Finding]:
    """What may be wrong with one device; one line when nothing is."""
    found = [
        finding
        for check in (_memory, _clocks, _power, _errors, _mode)
        if (finding := check(f"gpu {index}", handle)) is not None
    ]
    if found:
        return found
    name, memory = _text(_ask(pynvml.nvmlDeviceGetName, handle)), _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    heat = _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    clock = _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM)
    size = "memory unknown" if memory is None else f"{memory.total / 2**30:.1f} GiB"
    text = f"{name}, {size}, not throttled, up to {clock} MHz, {heat} °C"
    return [Finding(f"gpu {index}", "ok", text)]


def _memory(name: str, handle: Any) -> Finding | None:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is None or memory.used < BUSY_SHARE * memory.total:
        return None
    pids = [process.pid for process in _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or []]
    users = f" by process {', '.join(map(str, pids))}" if pids else ""
    text = f"{memory.used / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are in use{users}: the KV cache gets the rest"
    return Finding(
        f"{name} memory", "warning", text, "end what uses it, or choose another GPU with CUDA_VISIBLE_DEVICES"
    )


def _clocks(name: str, handle: Any) -> Finding | None:
    bits = _ask(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
    reasons = [reason for bit, reason in REASONS.items() if bits & bit]
    if not reasons:
        return None
    now = _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)
    most = _ask(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM)
    heat = _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
    text = f"throttled: {', '.join(reason[0] for reason in reasons)}; {now} of {most} MHz, {heat} °C"
    status: Status = "problem" if any(reason[1] for reason in reasons) else "warning"
    return Finding(f"{name} clocks", status, text, reasons[0][2])


def _power(name: str, handle: Any) -> Finding | None:
    limit = _ask(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    default = _ask(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    if limit is None or default is None or limit >= default:
        return None
    text = f"its power limit is {limit / 1000:.0f} W, by default {default / 1000:.0f} W: it is slower under load"
    return Finding(
        f"{name} power", "warning", text, f"nvidia-smi --power-limit={default / 1000:.0f}, if that was not meant"
    )


def _errors(name: str, handle: Any) -> Finding | None:
    wrong = _ask(
        pynvml.nvmlDeviceGetTotalEccErrors,
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
    )
    if wrong:
        text = f"{wrong} uncorrected memory errors since the driver was loaded"
        return Finding(f"{name} errors", "problem", text, "reset the GPU or reboot; if they come back, replace it")
    remapped = _ask(pynvml.nvmlDeviceGetRemappedRows, handle)
    if remapped is not None and (remapped[2] or remapped[3]):
        what = "could not be replaced" if remapped[3] else "wait for a reset to be replaced"
        fix = "replace the GPU" if remapped[3] else "reset the GPU or reboot"
        return Finding(f"{name} errors", "problem", f"faulty rows of memory {what}", fix)
    return None


def _mode(name: str, handle: Any) -> Finding | None:
    mode = _ask(pynvml.nvmlDeviceGetComputeMode, handle)
    if mode == pynvml.NVML_COMPUTEMODE_PROHIBITED:
        return Finding(f"{name} mode", "problem", "it refuses computing", "nvidia-smi --compute-mode=0")
    if (_ask(pynvml.nvmlDeviceGetMigMode, handle) or [0])[0]:
        text = "it is divided into instances (MIG): each has a part of its memory and bandwidth"
        return Finding(f"{name} mode", "warning", text, "nvidia-smi --multi-instance-gpu=0 gives the whole GPU")
    if _ask(pynvml.nvmlDeviceGetPersistenceMode, handle) == pynvml.NVML_FEATURE_DISABLED:
        text = "persistence mode is off: the first start after a pause waits for the driver"
        return Finding(f"{name} mode", "warning", text, "nvidia-smi --persistence-mode=1")
    return None


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """The driver's answer; None where this device or driver has none."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
