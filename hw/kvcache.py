"""KVCachePool: the tensors behind the block ids of a KVLayout."""

from __future__ import annotations

import math

import numpy as np
import torch

from core.kv_layout import KVGroup, KVLayout, LayerKV
from hw.ops import LayerCache

__all__ = ["KVCachePool", "KVGroup", "KVLayout", "LayerKV"]


class KVCachePool:
    """Allocates the cache of a layout. Zeroed: masked slots are multiplied by zero, so they must be finite.

    values_by_dim: V is [num_blocks, kv_heads, head_dim, block_size], for kernels that want a block's tokens innermost.

    scales: [layers, 2] float32 on the device, of K and V of each layer, for FP8 storage; None otherwise. The layers'
    k_scale and v_scale are views of it. They are 1 until somebody sets them, before the first step.

    Raises:
        MemoryError: names the bytes that were asked for.
    """

    def __init__(self, layout: KVLayout, device: torch.device, *, values_by_dim: bool = False) -> None:
        assert isinstance(layout.dtype, torch.dtype)
        self.layout = layout
        self.dtype = layout.dtype
        self.scales: torch.Tensor | None = None
        if self.dtype.itemsize == 1:
            num_layers = sum(len(group.layers) for group in layout.groups)
            self.scales = torch.ones(num_layers, 2, dtype=torch.float32, device=device)
        caches: dict[int, LayerCache] = {}
        try:
            for index, group in enumerate(layout.groups):
                blocks, heads, size, dim = group.num_blocks, group.kv.kv_heads, layout.block_size, group.kv.head_dim
                for layer in group.layers:
                    k = _zeros((blocks, heads, size, dim), self.dtype, device)
                    v_shape = (blocks, heads, dim, size) if values_by_dim else (blocks, heads, size, dim)
                    v = _zeros(v_shape, self.dtype, device)
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
