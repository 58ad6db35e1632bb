"""The CUDA backend: NVIDIA's GPUs from the A100 on; what each of them can do is in hw/devices.py."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from core.errors import QuireError
from hw.backend import Capabilities, Compiling, Forward, HostCopy, Span, Trace
from hw.comm import Comm
from hw.cuda.graphs import StepGraphs
from hw.cuda.ops import CudaOps
from hw.cuda.product import Product, finish
from hw.cuda.target import INTERPRET
from hw.devices import CUDA, Architecture, find
from hw.kvcache import KVCachePool, KVLayout
from hw.ops import Ops

log = logging.getLogger("quire.cuda")


class CudaSpan:
    """See Span: two events in the current stream."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._begin.record()

    def end(self) -> None:
        self._end.record()

    def seconds(self) -> float:
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


@dataclass(frozen=True, slots=True)
class PinnedCopy:
    """See HostCopy. `tensor` is pinned, and whole once `arrived` has happened."""

    tensor: torch.Tensor
    arrived: torch.cuda.Event

    def done(self) -> bool:
        return bool(self.arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> torch.Tensor:
        self.arrived.synchronize()
        return self.tensor


class CudaBackend:
    """See hw.backend.Backend. One object per device, and its process's only one.

    Args:
        name: of the backend. index: of the device. architecture: what the device can do.
        target: what its kernels are compiled for.
    """

    def __init__(self, name: str, index: int, architecture: Architecture, target: GPUTarget) -> None:
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)
        self._target = target
        self._pdl = architecture.dependent_launches and not INTERPRET.value
        properties = torch.cuda.get_device_properties(index)
        self.ops: Ops = CudaOps(self.device, self._pdl)
        self.capabilities = Capabilities.of_gpu(name, architecture, properties.name, properties.total_memory)

    def free_bytes(self) -> int:
        """What the driver would still give, with torch's own unused memory handed back first."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def make_kv_cache(self, layout: KVLayout) -> KVCachePool:
        return KVCachePool(layout, self.device, values_by_dim=layout.dtype.itemsize == 1)

    def all_reduce(self, x: torch.Tensor | Product, comm: Comm) -> torch.Tensor:
        return comm.all_reduce(finish(x))

    def copy_blocks(self, pool: KVCachePool, group: int, pairs: list[tuple[int, int]]) -> None:
        if not pairs:
            return
        source, target = torch.tensor(pairs).to(self.device, non_blocking=True).unbind(1)
        for cache in pool.of_group(group):
            for store in (cache.k, cache.v):
                raw = store.view(torch.uint8) if store.dtype.itemsize == 1 else store
                raw[target] = raw[source]

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return PinnedCopy(copy, arrived)

    def span(self) -> Span:
        return CudaSpan()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def graphs(self, forward: Forward, max_tokens: int, max_seqs: int) -> StepGraphs:
        return StepGraphs(forward, self.device, max_tokens, max_seqs)

    def precompile(self, trace: Trace, rank: int, ranks: int) -> Compiling | None:
        # It builds on this module.
        from hw.cuda.precompile import start

        try:
            return start(trace, self.capabilities, self._target, self._pdl, Comm(rank, ranks))
        except OSError as error:
            log.warning("kernels are compiled one by one: %s", error)
            return None


def available() -> str | None:
    """None, or why there is no usable device."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        architecture_of(0)
    except QuireError as error:
        return error.message
    return None


def architecture_of(index: int) -> Architecture:
    """Of a device. Raises QuireError invalid_config when the kernels are not made for it."""
    properties = torch.cuda.get_device_properties(index)
    return find(CUDA, f"sm_{properties.major}{properties.minor}", properties.name)


def settle_cache_keys() -> None:
    """Have Triton hash all functions of this package in a fixed order. A function's key is otherwise another one when
    a function that it calls was hashed before, and processes that compile in different orders miss each other's work.
    """
    for name, module in sorted(sys.modules.items(), key=lambda item: item[0]):
        if name.startswith("hw.cuda."):
            for _, function in sorted(vars(module).items(), key=lambda item: item[0]):
                if isinstance(function, JITFunction):
                    _ = function.cache_key


def make(rank: int, cache: Path | None) -> CudaBackend:
    """The device of a rank. Compiled kernels are kept in `cache`. Raises QuireError invalid_config as architecture_of,
    since `available` has looked at the first device only."""
    architecture = architecture_of(rank)
    keep_kernels(cache)
    target = GPUTarget("cuda", int(architecture.name.removeprefix("sm_")), architecture.wave)
    return CudaBackend("cuda", rank, architecture, target)


def keep_kernels(cache: Path | None) -> None:
    """Have Triton keep what it compiles in `cache`."""
    if cache is not None:
        triton.knobs.cache.dir = str(cache / "triton")
    settle_cache_keys()
