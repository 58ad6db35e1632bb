"""KVCachePool: the tensors behind block ids. KVLayout: which layers share a block table, and what a block costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.messages import KVSpec
from hw.ops import LayerCache


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one attention layer stores per token on this rank. `window` None: full attention."""

    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers (indices into the model) that share one block table. `num_blocks` is 0 until memory is planned."""

    layers: tuple[int, ...]
    kv: LayerKV
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The cache of one rank: groups of equal layers, and the storage type."""

    groups: tuple[KVGroup, ...]
    block_size: int
    dtype: torch.dtype

    @staticmethod
    def build(layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype) -> KVLayout:
        """Group the layers of a model (in order); full attention comes first, so that group 0 keeps whole prefixes."""
        members: dict[LayerKV, list[int]] = {}
        for index, layer in enumerate(layers):
            members.setdefault(layer, []).append(index)
        ordered = sorted(members, key=lambda kv: kv.window is not None)
        return KVLayout(tuple(KVGroup(tuple(members[kv]), kv) for kv in ordered), block_size, dtype)

    def bytes_per_token(self, group: int) -> int:
        """Bytes that one token takes in a group, over all of its layers, K and V."""
        kv = self.groups[group].kv
        return 2 * len(self.groups[group].layers) * kv.kv_heads * kv.head_dim * self.dtype.itemsize

    def specs(self) -> list[KVSpec]:
        """The groups as the scheduler sees them."""
        return [
            KVSpec(len(group.layers), self.bytes_per_token(index), group.kv.window)
            for index, group in enumerate(self.groups)
        ]

    def blocks_in(self, num_bytes: int) -> int:
        """How many blocks fit into `num_bytes` when every group gets the same number."""
        block_bytes = self.block_size * sum(self.bytes_per_token(index) for index in range(len(self.groups)))
        return num_bytes // block_bytes

    def with_blocks(self, num_blocks: int | Sequence[int]) -> KVLayout:
        """The layout with its number of blocks (one for all groups, or one per group)."""
        counts = [num_blocks] * len(self.groups) if isinstance(num_blocks, int) else list(num_blocks)
        groups = tuple(replace(group, num_blocks=count) for group, count in zip(self.groups, counts, strict=True))
        return replace(self, groups=groups)

    @property
    def num_blocks(self) -> list[int]:
        """Blocks per group."""
        return [group.num_blocks for group in self.groups]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache on this rank."""
        return sum(
            group.num_blocks * self.block_size * self.bytes_per_token(index) for index, group in enumerate(self.groups)
        )


class KVCachePool:
    """Allocates the cache of a layout. Zeroed: masked slots are multiplied by zero, so they must be finite.

    values_by_dim: V is [num_blocks, kv_heads, head_dim, block_size], for kernels that want a block's tokens innermost.

    scales: [layers, 2] float32 on the device, of K and V of each layer, for FP8 storage; None otherwise. The layers'
    k_scale and v_scale are views of it. They are 1 until somebody sets them, before the first step.

    Raises:
        MemoryError: names the bytes that were asked for.
    """

    def __init__(self, layout: KVLayout, device: torch.device, *, values_by_dim: bool = False) -> None:
        self.layout = layout
        self.scales: torch.Tensor | None = None
        if layout.dtype.itemsize == 1:
            num_layers = sum(len(group.layers) for group in layout.groups)
            self.scales = torch.ones(num_layers, 2, dtype=torch.float32, device=device)
        caches: dict[int, LayerCache] = {}
        try:
            for index, group in enumerate(layout.groups):
                blocks, heads, size, dim = group.num_blocks, group.kv.kv_heads, layout.block_size, group.kv.head_dim
                for layer in group.layers:
                    k = _zeros((blocks, heads, size, dim), layout.dtype, device)
                    v_shape = (blocks, heads, dim, size) if values_by_dim else (blocks, heads, size, dim)
                    v = _zeros(v_shape, layout.dtype, device)
                    scales = (None, None) if self.scales is None else self.scales[layer].unbind()
                    caches[layer] = LayerCache(k, v, index, layout.block_size, *scales)
        except (RuntimeError, torch.OutOfMemoryError, MemoryError) as error:
            text = f"the KV cache of {layout.total_bytes / 2**30:.2f} GiB does not fit"
            raise MemoryError(text + "; lower --num-kv-blocks or --kv-gib") from error
        self.layers = [caches[layer] for layer in sorted(caches)]

    def of_group(self, group: int) -> list[LayerCache]:
        """The caches of a group's layers."""
        return [self.layers[layer] for layer in self.layout.groups[group].layers]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU, pages that the system makes (zeroed) at their first touch: gigabytes cost nothing at start."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
