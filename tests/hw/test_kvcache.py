"""KVLayout's arithmetic and KVCachePool's tensors."""

from __future__ import annotations

import pytest
import torch

from core.messages import KVSpec
from hw.cpu.backend import CpuBackend
from hw.kvcache import KVCachePool, KVLayout, LayerKV

FULL, SLIDING = LayerKV(2, 16), LayerKV(2, 16, 32)


def test_layers_with_equal_caches_share_a_group_and_full_attention_comes_first() -> None:
    layout = KVLayout.build([SLIDING, FULL, SLIDING], 8, torch.bfloat16)
    assert [group.layers for group in layout.groups] == [(1,), (0, 2)]
    # K and V, 2 heads of 16 dimensions, 2 bytes.
    assert layout.specs() == [KVSpec(1, 128, None), KVSpec(2, 256, 32)]


def test_blocks_in_bytes() -> None:
    layout = KVLayout.build([SLIDING, FULL, SLIDING], 8, torch.bfloat16)
    block_bytes = 8 * (128 + 256)
    assert layout.blocks_in(10 * block_bytes) == 10
    assert layout.blocks_in(10 * block_bytes - 1) == 9
    assert layout.with_blocks(10).total_bytes == 10 * block_bytes
    assert layout.with_blocks([5, 2]).num_blocks == [5, 2]
    assert layout.with_blocks([5, 2]).total_bytes == 8 * (5 * 128 + 2 * 256)


def test_pool_gives_each_layer_its_own_zeroed_tensors() -> None:
    layout = KVLayout.build([SLIDING, FULL, SLIDING], 8, torch.bfloat16).with_blocks([5, 2])
    pool = CpuBackend().make_kv_cache(layout)
    assert [cache.group for cache in pool.layers] == [1, 0, 1]
    assert [tuple(cache.k.shape) for cache in pool.layers] == [(2, 2, 8, 16), (5, 2, 8, 16), (2, 2, 8, 16)]
    tensors = [tensor for cache in pool.layers for tensor in (cache.k, cache.v)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    assert all(tensor.dtype == torch.bfloat16 and not tensor.any() for tensor in tensors)
    assert pool.of_group(1) == [pool.layers[0], pool.layers[2]]


def test_copy_blocks_touches_one_group() -> None:
    backend = CpuBackend()
    pool = backend.make_kv_cache(KVLayout.build([SLIDING, FULL], 8, torch.float32).with_blocks(4))
    for cache in pool.layers:
        cache.k.normal_()
        cache.v.normal_()
    before = [(cache.k.clone(), cache.v.clone()) for cache in pool.layers]
    backend.copy_blocks(pool, 1, [(0, 3), (2, 1)])
    backend.copy_blocks(pool, 1, [])
    (sliding_k, sliding_v), (full_k, full_v) = before
    assert torch.equal(pool.layers[0].k, sliding_k[[0, 2, 2, 0]])
    assert torch.equal(pool.layers[0].v, sliding_v[[0, 2, 2, 0]])
    assert torch.equal(pool.layers[1].k, full_k)
    assert torch.equal(pool.layers[1].v, full_v)


def test_too_much_memory_is_said_with_the_amount() -> None:
    layout = KVLayout.build([FULL], 8, torch.float32).with_blocks(2**50)
    with pytest.raises(MemoryError, match=r"2147483648\.00 GiB does not fit; lower --num-kv-blocks"):
        KVCachePool(layout, torch.device("cpu"))
