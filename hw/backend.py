"""Backend: one hardware target. Capabilities: its facts, as data, so that nothing asks for a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from core.errors import QuireError
from hw.comm import Comm
from hw.devices import Architecture, ideal_step_tokens, with_fp8
from hw.kvcache import KVCachePool, KVLayout
from hw.ops import GroupInputs, LayerCache, Ops, StepInputs


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can do. Selection and defaults read these, never the device's name.

    dtypes: weights and activations it computes in, best first. kv_dtypes: cache storage. schemes: quantizations.
    graphs: steps can be captured and replayed. block_size: default tokens per KV block.
    ideal_step_tokens: where its GEMMs turn from memory-bound to compute-bound (pacing).
    fp8: torch's name of the format that "fp8" means here; None: it has none. architecture: for messages.
    """

    name: str
    device_name: str
    dtypes: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    schemes: tuple[str, ...]
    graphs: bool
    block_size: int
    ideal_step_tokens: int
    memory_bytes: int
    fp8: str | None = None
    architecture: str = ""

    @staticmethod
    def of_gpu(name: str, architecture: Architecture, device_name: str, memory_bytes: int) -> Capabilities:
        """Of a GPU, from the table of devices."""
        return Capabilities(
            name=name,
            device_name=device_name,
            dtypes=architecture.dtypes,
            kv_dtypes=architecture.kv_dtypes,
            schemes=architecture.schemes,
            graphs=architecture.graphs,
            block_size=32,  # with 16, an FP8 value tile is read in pieces of 64 bytes, a sixth slower on an H200
            ideal_step_tokens=ideal_step_tokens(architecture.name, memory_bytes),
            memory_bytes=memory_bytes,
            fp8=architecture.fp8,
            architecture=architecture.label,
        )

    def refusal(self, option: str, value: str, choices: tuple[str, ...]) -> QuireError:
        """invalid_config: the device cannot do what an option asks. option: the config's name of it."""
        device = f"{self.device_name} ({self.architecture})" if self.architecture else self.device_name
        text = f"--{option.replace('_', '-')}: {value!r} is not available on {device}"
        if value == "fp8" and self.fp8 is None:
            text += f", which has no FP8 products; {with_fp8()} have. Here"
        else:
            text += ";"
        return QuireError("invalid_config", f"{text} choose {', '.join(choices)}", option)


Forward = Callable[[torch.Tensor, StepInputs, list[LayerCache]], torch.Tensor]
"""ids [tokens] int32 -> hidden states [tokens, hidden] after the last norm; writes the caches."""


class StepGraphs(Protocol):
    """A Forward that replays captured graphs, one per padded token count: `sizes`, ascending."""

    sizes: list[int]

    def pad(self, tokens: int) -> int:
        """The padded size of a step of so many tokens."""
        ...

    def capture(self, groups: tuple[GroupInputs, ...], caches: list[LayerCache]) -> None:
        """Capture all sizes. groups: the block tables that later steps use (their slots do not matter)."""
        ...

    def __call__(self, ids: torch.Tensor, inputs: StepInputs, caches: list[LayerCache]) -> torch.Tensor:
        """Replay; the result is overwritten by the next call."""
        ...


class Span(Protocol):
    """The device's time from the call that made it to `end`: without the time in which its queue was empty before."""

    def end(self) -> None:
        """What is queued up to here belongs to it."""
        ...

    def seconds(self) -> float:
        """How long the device took; waits for the end."""
        ...


class HostCopy(Protocol):
    """A tensor on its way to the host."""

    def done(self) -> bool:
        """Whether it has arrived."""
        ...

    def wait(self) -> torch.Tensor:
        """The host tensor, once it has arrived."""
        ...


class Backend(Protocol):
    """The contract of hw/<target>/backend.py."""

    capabilities: Capabilities
    device: torch.device
    ops: Ops

    def free_bytes(self) -> int:
        """Memory that the KV cache may still take on the device, before any margin."""
        ...

    def make_kv_cache(self, layout: KVLayout) -> KVCachePool:
        """Allocate the cache tensors. Raises MemoryError that says how much was asked for."""
        ...

    def all_reduce(self, x: torch.Tensor, comm: Comm) -> torch.Tensor:
        """Sum over the ranks, in place where possible."""
        ...

    def copy_blocks(self, pool: KVCachePool, group: int, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks src -> dst in all layers of a group (copy-on-write)."""
        ...

    def to_host(self, tensor: torch.Tensor) -> HostCopy:
        """Start an asynchronous copy to the host."""
        ...

    def span(self) -> Span:
        """Begin to measure the device's time."""
        ...

    def synchronize(self) -> None:
        """Wait for all queued work."""
        ...

    def graphs(self, forward: Forward, max_tokens: int, max_seqs: int) -> StepGraphs | None:
        """The forward pass as captured graphs, for steps of up to so many tokens; None where there are no graphs."""
        ...


class Compiling(Protocol):
    """A model's kernels being compiled by other processes."""

    def wait(self) -> object:
        """Return when all are there, or when it takes too long: what is missing is compiled at its first launch."""
        ...

    def close(self) -> None:
        """Give up what is not done. May be called again."""
        ...


Trace = Callable[["Backend", Comm], None]
"""Builds a model on the stand-in backend given, and captures it."""


@runtime_checkable
class CompilesAhead(Protocol):
    """What a Backend offers besides when it compiles kernels: to begin before the weights are there."""

    def precompile(self, trace: Trace, rank: int, ranks: int) -> Compiling | None:
        """Begin, in other processes; `trace` runs in one of them. None when there is nothing to compile ahead."""
        ...
