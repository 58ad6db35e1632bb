"""The native decode functions against plain torch, with fresh random inputs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hw.cpu import native
from hw.cpu.native_ops import NativeOps
from hw.cpu.ops import CpuOps
from hw.ops import ActFormat, GroupInputs, HostInputs, LayerCache, StepInputs

PLAIN = ActFormat.PLAIN


@pytest.fixture(scope="module", params=[1, 2])
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeOps:
    library = native.load(tmp_path_factory.getbasetemp() / "native")
    if library is None:
        pytest.skip("no C compiler on this machine; the plain torch path is what runs here, and has its own tests")
    return NativeOps(library, request.param)


def step(lengths: list[int], tables: list[list[int]], block_size: int) -> StepInputs:
    """One token for each sequence, at the end of its length; state rows in reverse order."""
    count = len(lengths)
    rows = list(range(count))[::-1]
    width = max(len(table) for table in tables)
    table = torch.full((count, width), -1, dtype=torch.int32)
    for row, blocks in zip(rows, tables, strict=True):
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    slots = [t[(n - 1) // block_size] * block_size + (n - 1) % block_size for n, t in zip(lengths, tables, strict=True)]
    return StepInputs(
        rows=torch.tensor(rows, dtype=torch.int32),
        query_start=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        positions=torch.tensor([n - 1 for n in lengths], dtype=torch.int32),
        groups=(GroupInputs(table, torch.tensor(slots, dtype=torch.int32)),),
        num_tokens=count,
        num_seqs=count,
        num_decodes=count,
        max_query=1,
        max_seq_len=max(lengths),
        host=HostInputs(rows, list(range(count + 1)), lengths, (tables,)),
    )


@pytest.mark.parametrize("size", [16, 250, 256])
def test_norms(ops: NativeOps, size: int) -> None:
    x, residual, weight = torch.randn(7, size), torch.randn(7, size), torch.rand(size)
    for got, want in zip(
        (*ops.add_rms_norm(x, residual, weight, 1e-5, PLAIN), ops.rms_norm(x, weight, 1e-5, PLAIN)),
        (*CpuOps().add_rms_norm(x, residual, weight, 1e-5, PLAIN), CpuOps().rms_norm(x, weight, 1e-5, PLAIN)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 32, 33])
@pytest.mark.parametrize(("num_out", "num_in"), [(64, 48), (37, 250), (200, 704)])
@pytest.mark.parametrize("stored_in_half", [False, True])
def test_linear(ops: NativeOps, rows: int, num_out: int, num_in: int, stored_in_half: bool) -> None:
    x, weight, bias = torch.randn(rows, num_in), torch.randn(num_out, num_in), torch.randn(num_out)
    if stored_in_half:
        weight = weight.bfloat16().float()
    for b in (None, bias):
        want = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(ops.linear(x, weight, b).double(), want, atol=2e-4, rtol=1e-4)


def test_silu_mul(ops: NativeOps) -> None:
    x = torch.randn(5, 2 * 77) * 20
    torch.testing.assert_close(ops.silu_mul(x, PLAIN), CpuOps().silu_mul(x, PLAIN), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_rope_cache_and_attention(ops: NativeOps, head_dim: int, heads: tuple[int, int], norm: bool) -> None:
    num_heads, kv_heads = heads
    block_size = random.choice([8, 16])
    lengths = [random.randint(1, 900) for _ in range(9)] + [1, block_size, block_size + 1]
    blocks = list(range(sum(-(-n // block_size) for n in lengths)))
    random.shuffle(blocks)
    num_blocks = len(blocks)
    tables = [[blocks.pop() for _ in range(-(-n // block_size))] for n in lengths]
    inputs = step(lengths, tables, block_size)
    caches = []
    k, v = (torch.randn(num_blocks, kv_heads, block_size, head_dim) for _ in range(2))
    for _ in range(2):
        caches.append(LayerCache(k.clone(), v.clone(), 0, block_size))
    qkv = torch.randn(len(lengths), (num_heads + 2 * kv_heads) * head_dim)
    rope = torch.randn(1000, 2, (head_dim - (8 if head_dim == 80 else 0)) // 2)
    q_norm, k_norm = (torch.rand(head_dim) + 0.5 if norm else None for _ in range(2))
    qs = [
        one.rope_cache(qkv, num_heads, kv_heads, head_dim, rope, q_norm, k_norm, 1e-5, cache, inputs)
        for one, cache in zip((ops, CpuOps()), caches, strict=True)
    ]
    torch.testing.assert_close(qs[0], qs[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(caches[0].k, caches[1].k, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(caches[0].v, caches[1].v, atol=0, rtol=0)
    for window in (None, 5, 100):
        results = [one.attention(qs[1], caches[1], inputs, 0.2, window, PLAIN) for one in (ops, CpuOps())]
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_padding_is_not_stored(ops: NativeOps) -> None:
    inputs = step([3, 4], [[0], [1]], 8)
    inputs.groups[0].slots[1] = -1
    cache = LayerCache(torch.zeros(2, 1, 8, 16), torch.zeros(2, 1, 8, 16), 0, 8)
    ops.rope_cache(torch.randn(2, 48), 1, 1, 16, torch.randn(9, 2, 8), None, None, 0.0, cache, inputs)
    assert bool(cache.v[0, 0, 2].abs().sum() > 0)
    assert float(cache.v[1].abs().sum()) == 0


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert native.load(tmp_path) is None
