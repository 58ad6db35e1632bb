"""The CPU's FP8 cache, the oracle of the kernels', against plain formulas."""

from __future__ import annotations

import pytest
import torch

from hw.cpu.backend import CpuBackend
from hw.cpu.ops import CpuOps
from hw.kvcache import KVLayout, LayerKV
from hw.ops import ActFormat, LayerCache
from tests.hw.cpu.test_ops import BLOCK_SIZE, Step

F8 = torch.float8_e4m3fn
K_SCALE, V_SCALE = 0.02, 0.005


def cache_of(step: Step, dtype: torch.dtype) -> LayerCache:
    shape = (step.num_blocks, 2, BLOCK_SIZE, 16)
    scales = (torch.tensor(K_SCALE), torch.tensor(V_SCALE)) if dtype == F8 else ()
    return LayerCache(torch.zeros(shape).to(dtype), torch.zeros(shape).to(dtype), 0, BLOCK_SIZE, *scales)


def rope_of(positions: int) -> torch.Tensor:
    angles = torch.rand(positions, 8) * 6
    return torch.stack((angles.cos(), angles.sin()), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_and_what_is_read(dtype: torch.dtype) -> None:
    step = Step([(1, 1), (17, 17), (9, 9)], padding=2)
    qkv = torch.randn(step.tokens, (4 + 2 * 2) * 16).to(dtype)
    qkv[3] *= 100  # beyond 448 scales: clipped, not NaN
    rope, shape = rope_of(32), (4, 2, 16)
    plain, stored = cache_of(step, dtype), cache_of(step, F8)
    args = (qkv, *shape, rope, None, None, 0.0)
    ops = CpuOps()
    q = ops.rope_cache(*args, plain, step.inputs)
    assert torch.equal(ops.rope_cache(*args, stored, step.inputs), q)
    clipped = False
    for got, want, scale in ((stored.k, plain.k, K_SCALE), (stored.v, plain.v, V_SCALE)):
        values = (want.float() / scale).clamp(-448, 448)
        clipped |= bool((values.abs() == 448).any())
        assert torch.equal(got.view(torch.uint8), values.to(F8).view(torch.uint8))
    assert clipped
    back = LayerCache((stored.k.float() * K_SCALE).to(dtype), (stored.v.float() * V_SCALE).to(dtype), 0, BLOCK_SIZE)
    answers = [CpuOps().attention(q, c, step.inputs, 0.25, None, ActFormat.PLAIN) for c in (stored, back, plain)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_a_pool_has_scales_that_its_layers_see() -> None:
    layout = KVLayout.build([LayerKV(2, 16, 32), LayerKV(2, 16)], 8, F8).with_blocks(4)
    backend = CpuBackend()
    pool = backend.make_kv_cache(layout)
    assert pool.scales is not None
    pool.scales.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    seen = [torch.stack([c.k_scale, c.v_scale]) for c in pool.layers if c.k_scale is not None and c.v_scale is not None]
    assert torch.equal(torch.stack(seen), pool.scales)
    cache = pool.of_group(0)[0]
    cache.k.view(torch.uint8).random_(0, 120)
    before = cache.k.view(torch.uint8).clone()
    backend.copy_blocks(pool, 0, [(0, 3), (2, 1)])
    assert torch.equal(cache.k.view(torch.uint8), before[[0, 2, 2, 0]])
    assert backend.make_kv_cache(KVLayout.build([LayerKV(2, 16)], 8, torch.float32).with_blocks(1)).scales is None
