"""The CPU backend: float32 and bfloat16 in plain torch, on any machine that torch runs on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hw.backend import Capabilities, Forward, HostCopy, Span, StepGraphs
from hw.comm import Comm
from hw.cpu import native
from hw.cpu.native_ops import NativeOps
from hw.cpu.ops import CpuOps
from hw.devices import E4M3FN
from hw.kvcache import KVCachePool, KVLayout
from hw.ops import Ops


class CpuSpan:
    """See Span: the device's time is the caller's."""

    def __init__(self) -> None:
        self._begin_s = self._end_s = time.perf_counter()

    def end(self) -> None:
        self._end_s = time.perf_counter()

    def seconds(self) -> float:
        return self._end_s - self._begin_s


@dataclass(frozen=True, slots=True)
class Copied:
    """See HostCopy: it is there."""

    tensor: torch.Tensor

    def done(self) -> bool:
        return True

    def wait(self) -> torch.Tensor:
        return self.tensor


class CpuBackend:
    """See hw.backend.Backend. `cache`: folder of compiled native code; None: plain torch only, the oracle."""

    def __init__(self, cache: Path | None = None) -> None:
        self.device = torch.device("cpu")
        library = native.load(cache) if cache is not None else None
        self.ops: Ops = CpuOps() if library is None else NativeOps(library, torch.get_num_threads())
        self.capabilities = Capabilities(
            name="cpu",
            device_name=f"CPU, {torch.get_num_threads()} threads",
            dtypes=("float32", "bfloat16"),
            kv_dtypes=("float32", "bfloat16", "fp8"),
            schemes=("none", "int8", "int4"),
            graphs=False,
            block_size=16,
            ideal_step_tokens=128,
            memory_bytes=psutil.virtual_memory().total,
            fp8=E4M3FN,
        )

    def free_bytes(self) -> int:
        """Memory that the system could still give."""
        return int(psutil.virtual_memory().available)

    def make_kv_cache(self, layout: KVLayout) -> KVCachePool:
        return KVCachePool(layout, self.device)

    def all_reduce(self, x: torch.Tensor, comm: Comm) -> torch.Tensor:
        return comm.all_reduce(x)

    def copy_blocks(self, pool: KVCachePool, group: int, pairs: list[tuple[int, int]]) -> None:
        if not pairs:
            return
        source, target = torch.tensor(pairs).unbind(1)
        for cache in pool.of_group(group):
            for store in (cache.k, cache.v):
                raw = store.view(torch.uint8) if store.dtype.itemsize == 1 else store
                raw[target] = raw[source]

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        return Copied(tensor.clone())  # the caller may overwrite the tensor before it asks

    def span(self) -> Span:
        return CpuSpan()

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def graphs(self, forward: Forward, max_tokens: int, max_seqs: int) -> StepGraphs | None:
        return None


def available() -> str | None:
    """None: a CPU is always there."""
    return None


def make(rank: int, cache: Path | None) -> CpuBackend:
    """All ranks share the machine's CPU. Native code is kept in `cache`."""
    return CpuBackend(cache)
