"""The ROCm backend: AMD's Instinct GPUs, with the Triton kernels of hw/cuda. torch calls these devices "cuda" too."""

from __future__ import annotations

from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

from core.errors import QuireError
from hw.cuda.backend import CudaBackend, keep_kernels
from hw.devices import ROCM, Architecture, find


def available() -> str | None:
    """None, or why there is no usable device."""
    if torch.version.hip is None:
        return "this torch is not built for ROCm; install one that is, from pytorch.org's list"
    if not torch.cuda.is_available():
        return "torch finds no ROCm device"
    try:
        architecture_of(0)
    except QuireError as error:
        return error.message
    return None


def architecture_of(index: int) -> Architecture:
    """Of a device. Raises QuireError invalid_config when the kernels are not made for it."""
    properties = torch.cuda.get_device_properties(index)
    name = properties.gcnArchName.partition(":")[0]  # "gfx942:sramecc+:xnack-"
    return find(ROCM, name, properties.name)


def make(rank: int, cache: Path | None) -> CudaBackend:
    """The device of a rank. Compiled kernels are kept in `cache`. Raises QuireError invalid_config as architecture_of,
    since `available` has looked at the first device only."""
    architecture = architecture_of(rank)
    keep_kernels(cache)
    return CudaBackend("rocm", rank, architecture, GPUTarget("hip", architecture.name, architecture.wave))
