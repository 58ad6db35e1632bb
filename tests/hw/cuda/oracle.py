"""What the kernels are held against: the same mathematics in float32 torch, one sequence and one head at a time."""

from __future__ import annotations

import math

import torch

FP8_MAX = 448.0


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected||; NaN if any element was never written (outputs are poisoned with NaN)."""
    result, expected = result.float(), expected.float()
    return float((result - expected).norm() / expected.norm().clamp_min(1e-30))


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables: torch.Tensor,
    rows: list[int],
    query_start: list[int],
    seq_lens: list[int],
    scale: float,
    window: int | None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """q [tokens, hq, d] over the paged cache -> [tokens, hq, d] float32."""
    heads, kv_heads, size = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    out = torch.full(q.shape, math.nan, dtype=torch.float32, device=q.device)
    for i, row in enumerate(rows):
        start, stop, length = query_start[i], query_start[i + 1], seq_lens[i]
        if stop == start:
            continue
        blocks = tables[row, : -(-length // size)].long()
        k, v = (
            (cache[blocks].float() * factor).permute(1, 0, 2, 3).reshape(kv_heads, -1, q.shape[2])[:, :length]
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        position = torch.arange(length - (stop - start), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None, :]
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        for head in range(heads):
            kv = head * kv_heads // heads
            scores = q[start:stop, head].float() @ k[kv].T * scale
            out[start:stop, head] = torch.softmax(scores.masked_fill(hidden, -math.inf), -1) @ v[kv]
    return out


def dequantised(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FP8 values [tokens, n] with a scale per token, or [groups, tokens] scales, in float32."""
    if scale.dim() == 2:
        return values.float() * scale.T.repeat_interleave(values.shape[1] // scale.shape[0], 1)
    return values.float() * scale[:, None]


def gumbel_noise(ids: torch.Tensor, key0: int, key1: int) -> torch.Tensor:
    """The contract's noise of ids [n], computed with Python's integers and in float64."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    result = []
    for index in ids.tolist():
        h = mix((mix(index ^ key0 & 0xFFFFFFFF) + key1) & 0xFFFFFFFF)
        u = (h >> 8) * 2.0**-24 + 2.0**-25
        result.append(-math.log(-math.log(u)))
    return torch.tensor(result, dtype=torch.float64)
