"""Every kernel against plain torch, fresh random inputs each time: in the interpreter, or on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hw.cuda.add_rms_norm import add_rms_norm, rms_norm
from hw.cuda.attention_decode import attention_decode
from hw.cuda.attention_finish import attention_finish
from hw.cuda.attention_prefill import attention_prefill
from hw.cuda.embed import embed
from hw.cuda.fp8_linear import fp8_linear
from hw.cuda.product import Fp8, Product, finish
from hw.cuda.rope_cache import rope_cache
from hw.cuda.sample import sample
from hw.cuda.silu_mul import silu_mul
from hw.cuda.target import FP8
from tests.hw.cuda import oracle

BF16, F32, F8 = torch.bfloat16, torch.float32, FP8
BF16_ERROR, FP8_ERROR = 1e-2, 4e-2
GPU = torch.cuda.is_available()

# numpy warns about a conversion that Triton's interpreter makes for run-time loop bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def make_product(
    device: torch.device, tokens: int, width: int, splits: int, bias: bool
) -> tuple[Product, torch.Tensor]:
    """A random unfinished product, and what it means in float32."""
    values = torch.randn(splits, tokens, width, device=device)
    row, col = torch.rand(tokens, device=device) + 0.5, torch.rand(width, device=device) + 0.5
    add = torch.randn(width, device=device).to(BF16) if bias else None
    meant = values.sum(0) * row[:, None] * col
    if add is not None:
        meant = meant + add.float()
    return Product(values, BF16, row, col, add), meant


def plain(x: torch.Tensor | Fp8) -> torch.Tensor:
    return oracle.dequantised(x.values, x.scale) if isinstance(x, Fp8) else x.float()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (3, 192), (5, 4096)])
def test_rms_norm(device: torch.device, tokens: int, width: int, fp8: bool) -> None:
    x = torch.randn(tokens, width, device=device).to(BF16)
    weight = torch.rand(width, device=device).to(BF16)
    expected = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
    error = oracle.relative_error(plain(rms_norm(x, weight, 1e-5, fp8=fp8)), expected)
    assert error < (FP8_ERROR if fp8 else BF16_ERROR)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("splits", [0, 1, 4])
def test_add_rms_norm(device: torch.device, splits: int, fp8: bool) -> None:
    tokens, width = 3, 320
    residual = torch.randn(tokens, width, device=device).to(BF16)
    weight = torch.rand(width, device=device).to(BF16)
    x: torch.Tensor | Product
    if splits:
        x, meant = make_product(device, tokens, width, splits, bias=splits == 4)
    else:
        x = torch.randn(tokens, width, device=device).to(BF16)
        meant = x.float()
    total = residual.float() + meant
    expected = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
    result, kept = add_rms_norm(x, residual, weight, 1e-5, fp8=fp8)
    assert oracle.relative_error(kept, total) < BF16_ERROR
    assert oracle.relative_error(plain(result), expected) < (FP8_ERROR if fp8 else BF16_ERROR)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("width", [96, 3000])
def test_silu_mul(device: torch.device, width: int, fp8: bool) -> None:
    x, meant = make_product(device, 3, 2 * width, 2, bias=True)
    expected = torch.nn.functional.silu(meant[:, :width]) * meant[:, width:]
    assert oracle.relative_error(plain(silu_mul(x, fp8=fp8)), expected) < (FP8_ERROR if fp8 else BF16_ERROR)
    bare = meant.to(BF16)
    expected = torch.nn.functional.silu(bare.float()[:, :width]) * bare.float()[:, width:]
    assert oracle.relative_error(plain(silu_mul(bare, fp8=fp8)), expected) < (FP8_ERROR if fp8 else BF16_ERROR)


def test_finish(device: torch.device) -> None:
    x, meant = make_product(device, 3, 100, 3, bias=True)
    assert oracle.relative_error(finish(x), meant) < BF16_ERROR


def test_embed_gives_zero_outside_the_table(device: torch.device) -> None:
    table = torch.randn(10, 48, device=device).to(BF16)
    result = embed(torch.tensor([3, 9, 10, -1], dtype=torch.int32, device=device), table)
    assert torch.equal(result[:2], table[[3, 9]])
    assert not result[2:].any()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary", "store", "norm"),
    [(4, 2, 64, 64, BF16, False), (3, 3, 96, 48, F8, False), (8, 1, 128, 128, F8, True), (2, 1, 256, 256, BF16, True)],
)
def test_rope_cache(
    device: torch.device, heads: int, kv_heads: int, dim: int, rotary: int, store: torch.dtype, norm: bool, many: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if many:
        monkeypatch.setattr("hw.cuda.rope_cache.MANY_ROWS", 2)
    tokens, size, blocks = 5, 16, 4
    qkv, meant = make_product(device, tokens, (heads + 2 * kv_heads) * dim, 2, bias=True)
    angles = torch.rand(50, rotary // 2, device=device) * 6
    rope = torch.stack((angles.cos(), angles.sin()), 1).contiguous()
    positions = torch.tensor([0, 7, 49, 3, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([5, 63, 16, 31, -1], dtype=torch.int32, device=device)
    caches = [torch.zeros(blocks, kv_heads, size, dim, device=device).to(store) for _ in range(2)]
    if store == F8:
        caches[1] = caches[1].view(blocks, kv_heads, dim, size)
    weights = [(torch.rand(dim, device=device) + 0.5).to(BF16) if norm else None for _ in range(2)]
    scales = [torch.tensor(s, device=device) if store == F8 else None for s in (0.05, 0.06)]  # nothing is clipped
    q = rope_cache(
        qkv, heads, kv_heads, dim, rope, positions, slots, *caches, k_scale=scales[0], v_scale=scales[1],
        q_norm=weights[0], k_norm=weights[1], eps=1e-5,
    )  # fmt: skip
    split = meant.view(tokens, -1, dim)
    parts = [split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]]
    cos, sin = rope[positions.long()][:, :, None].unbind(1)
    half = rotary // 2
    for i, weight in enumerate(weights):
        x = parts[i]
        if weight is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.float()
        first, second = x[..., :half], x[..., half:rotary]
        parts[i] = torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., rotary:]), -1)
    assert oracle.relative_error(q, parts[0]) < BF16_ERROR
    for cache, expected, scale in zip(caches, parts[1:], scales, strict=True):
        if cache.shape[2:] != (size, dim):
            cache = cache.mT
        flat = cache.float().permute(0, 2, 1, 3).reshape(-1, kv_heads, dim)
        if scale is not None:
            flat = flat * scale
        assert oracle.relative_error(flat[slots[:4].long()], expected[:4]) < (FP8_ERROR if store == F8 else BF16_ERROR)
        untouched = [i for i in range(blocks * size) if i not in slots.tolist()]
        assert not flat[untouched].any()


def check_attention(
    device: torch.device, lens: list[int], counts: list[int], heads: int, kv_heads: int, dim: int, store: torch.dtype,
    window: int | None = None, size: int = 16, fp8: bool = False, pad: int = 2,
) -> None:  # fmt: skip
    """One mixed batch with padding sequences and padding tokens; block ids in random order."""
    seqs, tokens = len(lens), sum(counts)
    width = max(-(-n // size) for n in lens) + 1
    rows = torch.randperm(seqs + 3)[:seqs].tolist()
    num_blocks = 1 + sum(-(-n // size) for n in lens)
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.full((seqs + 3, width), 10**6, dtype=torch.int32)
    for row, n in zip(rows, lens, strict=True):
        for i in range(-(-n // size)):
            tables[row, i] = free.pop()
    caches = [torch.randn(num_blocks, kv_heads, size, dim, device=device).to(store) for _ in range(2)]
    q_type = F32 if store == F32 else BF16
    q = torch.randn(tokens + pad, heads, dim, device=device).to(q_type)
    starts = [sum(counts[:i]) for i in range(seqs + 1)]
    padded = [torch.tensor(x, dtype=torch.int32, device=device) for x in
              (rows + [0] * pad, starts + [tokens] * pad, lens + [0] * pad)]  # fmt: skip
    scales = [torch.tensor(s, device=device) for s in (0.5, 2.0)] if store == F8 else [None, None]
    k_scale, v_scale = (0.5, 2.0) if store == F8 else (1.0, 1.0)
    tables = tables.to(device)
    expected = oracle.attention(
        q, caches[0], caches[1], tables, rows, starts, lens, dim**-0.5, window, k_scale, v_scale)[:tokens]  # fmt: skip
    out = torch.zeros_like(q)
    out[:tokens] = math.nan
    if store == F8:
        caches[1] = caches[1].mT.contiguous()
    shared: tuple[Any, ...] = (q, *caches, tables, *padded, dim**-0.5, window)
    attention_prefill(*shared, out=out, k_scale=scales[0], v_scale=scales[1])
    parts = attention_decode(*shared, k_scale=scales[0], v_scale=scales[1])
    result = attention_finish(parts, padded[1], padded[2], out, fp8=fp8)
    found = plain(result)[:tokens].view(tokens, heads, dim)
    limit = FP8_ERROR if fp8 else 1e-4 if store == F32 else BF16_ERROR
    error = oracle.relative_error(found, expected)
    assert error < limit, f"relative error {error:.2e}"


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_attention_of_a_mixed_batch(device: torch.device, dim: int) -> None:
    check_attention(device, [1, 16, 37, 70, 5], [1, 1, 1, 6, 5], 4, 2, dim, BF16)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8])
def test_attention_groups(device: torch.device, group: int) -> None:
    check_attention(device, [33, 20], [1, 9], 2 * group, 2, 64, F8, fp8=True)


def test_attention_quantised_per_token(device: torch.device) -> None:
    check_attention(device, [33, 60], [1, 40], 8, 2, 64, BF16, fp8=True)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_attention_of_an_fp8_cache(device: torch.device, dim: int) -> None:
    check_attention(device, [1, 16, 37, 200, 5], [1, 1, 1, 1, 5], 8, 2, dim, F8)


@pytest.mark.parametrize("store", [BF16, F8])
@pytest.mark.parametrize("window", [1, 17, 64])
def test_attention_window(device: torch.device, window: int, store: torch.dtype) -> None:
    check_attention(device, [1, 150, 90, 127], [1, 1, 50, 1], 4, 4, 64, store, window=window)


def test_attention_in_float32_and_large_blocks(device: torch.device) -> None:
    check_attention(device, [130, 64, 65], [1, 1, 30], 4, 2, 64, F32, size=64)
    check_attention(device, [130, 64, 65], [1, 1, 30], 4, 2, 64, F8, size=64)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("tokens", "num_out", "num_in"), [(1, 128, 2048), (5, 80, 1536), (17, 64, 2048)])
def test_fp8_linear(device: torch.device, tokens: int, num_out: int, num_in: int, grouped: bool) -> None:
    shape = (num_in // 256, tokens) if grouped else (tokens,)
    x = Fp8(torch.randn(tokens, num_in, device=device).to(F8), torch.rand(shape, device=device) + 0.5)
    weight, scale = torch.randn(num_out, num_in, device=device).to(F8), torch.rand(num_out, device=device) + 0.5
    bias = torch.randn(num_out, device=device).to(BF16)
    result = fp8_linear(x, weight, scale, bias, BF16, torch.ones((), device=device))
    assert result.values.shape[0] > 1
    expected = oracle.dequantised(x.values, x.scale) @ oracle.dequantised(weight, scale).T + bias.float()
    assert oracle.relative_error(finish(result), expected) < BF16_ERROR


@pytest.mark.parametrize(("tokens", "width", "shape"), [(3, 1536, (6, 3)), (40, 512, (40,)), (3, 300, (3,))])
def test_small_steps_have_a_scale_per_group(
    device: torch.device, tokens: int, width: int, shape: tuple[int, ...]
) -> None:
    x, meant = make_product(device, tokens, 2 * width, 1, bias=False)
    result = silu_mul(x, fp8=True)
    assert isinstance(result, Fp8)
    assert result.scale.shape == shape
    expected = torch.nn.functional.silu(meant[:, :width]) * meant[:, width:]
    assert oracle.relative_error(plain(result), expected) < FP8_ERROR


def test_silu_mul_of_many_rows(device: torch.device) -> None:
    """Several rows to a program, the last of which has fewer."""
    x, meant = make_product(device, 531, 128, 1, bias=False)
    expected = torch.nn.functional.silu(meant[:, :64]) * meant[:, 64:]
    assert oracle.relative_error(plain(silu_mul(x, fp8=True)), expected) < FP8_ERROR


def test_sample(device: torch.device) -> None:
    rows, vocab = 4, 5000
    logits = torch.randn(rows, vocab, device=device)
    logits[0, [77, 4000]] = 9.0
    temperature = torch.tensor([0.0, 1.0, 0.3, 2.0], device=device)
    keys = torch.randint(-(2**31), 2**31, (2, rows), dtype=torch.int32, device=device)
    ids = sample(logits, temperature, keys[0], keys[1])
    assert ids[0] == 77
    for row in range(1, rows):
        noise = oracle.gumbel_noise(torch.arange(vocab), int(keys[0, row]), int(keys[1, row]))
        score = logits[row].cpu().double() / float(temperature[row]) + noise
        assert score[ids[row]] >= score.max() - 1e-4
    assert sample(logits, None, None, None).tolist() == logits.argmax(-1).tolist()


def test_sample_draws_only_what_is_finite(device: torch.device) -> None:
    """A grammar's rows have -inf for all but a few ids, which may all lie in one program's part."""
    rows, vocab = 3, 5000
    logits = torch.full((rows, vocab), -torch.inf, device=device)
    kept = [[4999], [0, 17], [1023, 1024, 3000]]
    for row, ids in enumerate(kept):
        logits[row, ids] = torch.randn(len(ids), device=device) * 30 - 1000
    temperature = torch.tensor([0.01, 5.0, 0.0], device=device)
    for _ in range(3):
        keys = torch.randint(-(2**31), 2**31, (2, rows), dtype=torch.int32, device=device)
        drawn = sample(logits, temperature, keys[0], keys[1]).tolist()
        assert all(token in ids for token, ids in zip(drawn, kept, strict=True))
    assert sample(logits, None, None, None).tolist() == logits.argmax(-1).tolist()
