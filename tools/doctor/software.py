"""Software: Python and the packages that meet the device. torch is imported in another process, so that a broken one
cannot break the doctor.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import msgspec

from core.config import Config
from hw.cpu import native
from hw.devices import CUDA, ROCM, with_fp8
from tools.doctor.finding import Finding, Status

TIMEOUT_S = 120.0  # the first import of torch on a slow disk takes a minute
PROBE = """
import json
found = {}
try:
    import torch
    found |= {"torch": torch.__version__, "cuda_build": torch.version.cuda, "hip_build": torch.version.hip}
    try:
        found["devices"] = [
            {"name": p.name, "architecture": p.gcnArchName.partition(":")[0] if torch.version.hip
                else f"sm_{p.major}{p.minor}"}
            for p in (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
        ]
        if found["devices"]:
            torch.zeros(1, device="cuda")
    except Exception as error:
        found["cuda_error"] = str(error).strip().partition("\\n")[0] or type(error).__name__
except Exception as error:
    found["torch_error"] = f"{type(error).__name__}: {error}".partition("\\n")[0]
try:
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["triton_error"] = f"{type(error).__name__}: {error}".partition("\\n")[0]
print("\\n" + json.dumps(found))
"""


class Device(msgspec.Struct, frozen=True):
    """A GPU as torch sees it. architecture: as in hw/devices.py."""

    name: str
    architecture: str


class Installed(msgspec.Struct, frozen=True):
    """What the probe found; *_error: why something is not there."""

    torch: str | None = None
    cuda_build: str | None = None
    hip_build: str | None = None
    devices: list[Device] = []
    cuda_error: str | None = None
    torch_error: str | None = None
    triton: str | None = None
    triton_error: str | None = None


class Probe:
    """The other process between `with`. Begun early: it takes seconds, in which other checks run."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._process as process:  # closes the pipes and waits
            process.kill()

    def result(self) -> Installed:
        """Wait for it. A process that dies or hangs is an error of torch."""
        try:
            out, err = self._process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Installed(torch_error=f"importing it took more than {TIMEOUT_S:.0f} s")
        try:
            found: Any = json.loads(out.strip().splitlines()[-1])
        except (IndexError, ValueError):
            last = (err.strip().splitlines() or ["no output"])[-1]
            return Installed(torch_error=f"importing it ended the process ({self._process.returncode}): {last}")
        return msgspec.convert(found, Installed)


def python() -> Finding:
    """The interpreter."""
    return Finding("python", "ok", f"Python {platform.python_version()} ({sys.executable})")


def packages(installed: Installed, config: Config, num_gpus: int) -> list[Finding]:
    """torch and triton, and whether torch can use the GPUs that the driver shows.

    Args:
        num_gpus: that the driver shows.
    """
    wants_gpu = config.device in ("cuda", "rocm") or (config.device == "auto" and num_gpus > 0)
    findings = [_torch(installed), _triton(installed, wants_gpu)]
    if installed.torch is not None:
        findings.append(_devices(installed, config, num_gpus))
    return findings


def _torch(installed: Installed) -> Finding:
    if installed.torch is None:
        text = f"torch cannot be imported: {installed.torch_error}"
        return Finding("torch", "problem", text, "install it: make serve, or pip install -e . in Quire's folder")
    kind = f"CUDA {installed.cuda_build}" if installed.cuda_build else "CPU"
    if installed.hip_build:
        text = f"torch {installed.torch} is built for ROCm {installed.hip_build}; Quire has not run on AMD GPUs yet"
        return Finding("torch", "warning", text, "try a small model first, and compare its answers with --device cpu")
    return Finding("torch", "ok", f"torch {installed.torch}, built for {kind}")


def _triton(installed: Installed, wants_gpu: bool) -> Finding:
    if installed.triton is not None:
        return Finding("triton", "ok", f"triton {installed.triton}")
    if not wants_gpu:
        return Finding("triton", "skipped", "not installed; only GPUs need it")
    text = f"triton cannot be imported: {installed.triton_error}"
    return Finding("triton", "problem", text, "install it: pip install triton")


def _devices(installed: Installed, config: Config, num_gpus: int) -> Finding:
    """Whether torch sees what the driver shows, and whether that will do."""
    if config.device in ("cpu", "null"):
        return Finding("cuda", "skipped", f"--device {config.device} needs no GPU")
    status: Status = "problem" if config.device in ("cuda", "rocm") or num_gpus else "skipped"
    if installed.cuda_error is not None:
        fix = "try nvidia-smi; a driver that was updated needs a reboot, a container --gpus all"
        return Finding("cuda", status, f"torch cannot use the GPU: {installed.cuda_error}", fix)
    if not installed.devices:
        if num_gpus and not installed.cuda_build:
            fix = "install a build of torch for CUDA, from pytorch.org's list"
            return Finding("cuda", "problem", f"the driver shows {num_gpus} GPUs; this torch is built for CPUs", fix)
        if num_gpus:
            fix = "look at CUDA_VISIBLE_DEVICES, and at the permissions of /dev/nvidia*"
            return Finding("cuda", "problem", f"the driver shows {num_gpus} GPUs, torch finds none", fix)
        fix = "" if status == "skipped" else "leave --device out to serve on the CPU, or install the NVIDIA driver"
        return Finding("cuda", status, "no GPU: the CPU serves" if not fix else "there is no GPU", fix)
    return _good_enough(installed.devices, config)


def _good_enough(devices: list[Device], config: Config) -> Finding:
    names = ", ".join(f"{device.name} ({device.architecture})" for device in devices)
    if config.tensor_parallel_size > len(devices):
        text = f"--tensor-parallel-size {config.tensor_parallel_size}: torch sees {len(devices)} GPUs: {names}"
        return Finding("cuda", "problem", text, f"lower it to {len(devices)}")
    known = CUDA | ROCM
    used = devices[: config.tensor_parallel_size]
    if any(device.architecture not in known for device in used):
        return Finding("cuda", "problem", f"{names}: the kernels are made for {', '.join(known)}", "use --device cpu")
    if "fp8" in (config.quantization, config.kv_dtype) and any(known[d.architecture].fp8 is None for d in used):
        fix = f"leave out --quantization fp8 and --kv-dtype fp8, or use one of {with_fp8()}"
        return Finding("cuda", "problem", f"{names}: there are no FP8 products", fix)
    return Finding("cuda", "ok", f"torch sees {names}")


def compiler(config: Config, num_gpus: int) -> Finding:
    """Triton compiles its launchers with the C compiler, the CPU backend its decode functions."""
    found = native.find_compiler()
    install = "install one, for example: apt install gcc"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if config.device == "null":
        return Finding("c compiler", "skipped", "the null device needs none")
    if config.device in ("cuda", "rocm") or (config.device == "auto" and num_gpus):
        if found is None:
            return Finding("c compiler", "problem", "there is none; triton cannot launch kernels without", install)
        if not headers.is_file():
            text = f"{found}, but {headers} is missing: triton cannot launch kernels without"
            return Finding(
                "c compiler", "problem", text, "install Python's headers, for example: apt install python3-dev"
            )
        return Finding("c compiler", "ok", f"{found}, with Python's headers")
    if found is None:
        return Finding(
            "c compiler", "warning", "there is none: decoding on the CPU takes torch's way, which is slower", install
        )
    if native.load(Path(config.cache_dir)) is None:
        text = f"{found} cannot build the CPU's native functions: torch serves instead, more slowly"
        return Finding("c compiler", "warning", text, "install gcc with OpenMP, for example: apt install gcc libgomp1")
    return Finding("c compiler", "ok", f"{found}; the CPU's native functions are built")
