"""attention_decode over an FP8 cache: both products in FP8, without converting a key or a value.

Keys and values are the left operands, 64 rows or more, so the tensor cores take them as they lie in memory; for the
second product that asks for values with the tokens of a block innermost, [num_blocks, hkv, d, block_size]. The right
operands, queries and probabilities, are an e4m3 value and a second one for what its rounding lost; together they carry
7 bits, about as much as bfloat16. For probabilities the two are different columns of one product, whose 16 columns are
more than a group of heads needs; the scores come out of two products, equal in both halves of their columns.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.attention_split import LOG2E, Parts, split_range
from hw.cuda.product import launch_options
from hw.cuda.target import FP8_MAX, fp8_dot, launch_next, stages, to_fp8, wait, wait_at_end

P_SCALE = 128.0  # probabilities are at most 1; FP8's range reaches 240 or 448


@triton.jit
def two_parts(x, is_rest, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """x, equal in both halves of its columns -> its FP8 value, and in the columns `is_rest` 16 times the remainder."""
    rounded = to_fp8(x, LIMIT, DTYPE).to(tl.float32)
    return to_fp8(tl.where(is_rest, (x - rounded) * 16.0, rounded), LIMIT, DTYPE)


@triton.jit
def attention_decode_fp8_kernel(
    q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale, v_scale, parts, stats, table_width, window,
    scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, LIMIT: tl.constexpr, P_SCALE: tl.constexpr, LATE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(query_start + seq)
    is_decode = tl.load(query_start + seq + 1) - token == 1
    length = tl.load(seq_lens + seq)
    row = tl.load(rows + seq).to(tl.int64)
    first, size = split_range(length, window, SPLITS, MIN_SPLIT, WINDOW)
    begin = first + split * size
    end = tl.minimum(begin + size, length)
    if not LATE:
        wait(PDL)
    launch_next(PDL)
    if is_decode and (begin < end):
        FP8: tl.constexpr = k_cache.dtype.element_ty
        COLUMNS: tl.constexpr = 2 * SLOTS
        SAME: tl.constexpr = min(BLOCK_SIZE, TILE)  # keys of a tile that follow each other in one block
        column = tl.arange(0, COLUMNS)
        g = column % SLOTS
        is_rest = column >= SLOTS
        d = tl.arange(0, BLOCK_D)
        keys = tl.arange(0, TILE)
        in_group = g < GROUP
        in_dim = d < HEAD_DIM
        head = kv_head * GROUP + g
        at = (token * HEADS + head)[None, :] * HEAD_DIM + d[:, None]
        x = tl.load(q + at, mask=in_group[None, :] & in_dim[:, None], other=0.0).to(tl.float32)
        query_scale = tl.maximum(tl.max(tl.abs(x), 0) / LIMIT, 1e-20)
        x = x / query_scale[None, :]
        query = to_fp8(x, LIMIT, FP8)
        query_rest = to_fp8(x - query.to(tl.float32), LIMIT, FP8)
        factor = query_scale * (scale * tl.load(k_scale))
        top = tl.full((COLUMNS,), -1e30, tl.float32)  # finite: the first keys of a window may all be hidden
        sums = tl.zeros((TILE, COLUMNS), tl.float32)  # summed over the keys once, at the end
        acc = tl.zeros((BLOCK_D, COLUMNS), tl.float32)
        for start in range(begin, end, TILE):
            key = start + keys
            visible = key < end
            block = tl.load(block_tables + row * table_width + key // BLOCK_SIZE, mask=visible, other=0)
            # Keys past the end read block 0, which is allocated and finite: unmasked loads are copied asynchronously.
            base = (tl.max_constancy(block, SAME).to(tl.int64) * KV_HEADS + kv_head) * (BLOCK_SIZE * HEAD_DIM)
            within = key % BLOCK_SIZE
            k_at = (base + within * HEAD_DIM)[:, None] + d[None, :]
            v_at = (base + within)[None, :] + d[:, None] * BLOCK_SIZE
            if BLOCK_D == HEAD_DIM:
                k = tl.load(k_cache + k_at)
                v = tl.load(v_cache + v_at)
            else:
                k = tl.load(k_cache + k_at, mask=in_dim[None, :], other=0.0)
                v = tl.load(v_cache + v_at, mask=in_dim[:, None], other=0.0)
            scores = fp8_dot(k, query_rest, fp8_dot(k, query, tl.zeros((TILE, COLUMNS), tl.float32)))
            scores = scores * factor[None, :]
            if WINDOW:
                visible = visible & (key >= length - window)
            scores = tl.where(visible[:, None], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 0))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(scores - new_top[None, :])
            sums = sums * shrink[None, :] + p
            acc = fp8_dot(v, two_parts(p * P_SCALE, is_rest[None, :], LIMIT, FP8), acc * shrink[None, :])
            top = new_top
        acc = acc * (tl.where(is_rest, 0.0625, 1.0) * (tl.load(v_scale) / P_SCALE))[None, :]
        values = tl.sum(tl.reshape(acc, (BLOCK_D, 2, SLOTS)), 1)
        slot = tl.arange(0, SLOTS)
        part = (token * SPLITS + split) * HEADS + kv_head * GROUP
        where = (part + slot)[None, :] * HEAD_DIM + d[:, None]
        tl.store(parts + where, values, mask=(slot < GROUP)[None, :] & in_dim[:, None])
        kept = in_group & (column < SLOTS)
        tl.store(stats + (part + g) * 2, top, mask=kept)
        tl.store(stats + (part + g) * 2 + 1, tl.sum(sums, 0), mask=kept)
    if LATE:
        wait_at_end(PDL)


def attention_decode_fp8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    scale: float,
    parts: Parts,
    *,
    late: bool,
    pdl: bool,
) -> None:
    """Fills `parts`; arguments as in attention_decode. k_cache [num_blocks, hkv, block_size, d], v_cache
    [num_blocks, hkv, d, block_size] e4m3; k_scale, v_scale float32 scalars."""
    heads, head_dim = q.shape[1], q.shape[2]
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    if v_cache.shape != (k_cache.shape[0], kv_heads, head_dim, block_size):
        raise ValueError(f"values must lie as [num_blocks, hkv, d, block_size], not {tuple(v_cache.shape)}")
    group = heads // kv_heads
    block_d = triton.next_power_of_2(head_dim)
    window = parts.window
    attention_decode_fp8_kernel[(rows.shape[0], kv_heads, parts.values.shape[1])](
        q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale, v_scale, parts.values, parts.stats,
        block_tables.stride(0), window or 0, scale * LOG2E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=max(64, block_d), BLOCK_SIZE=block_size, GROUP=group,
        SLOTS=max(8, triton.next_power_of_2(group)), TILE=64 if block_d > 128 else 128, SPLITS=parts.values.shape[1],
        MIN_SPLIT=parts.min_split, WINDOW=window is not None, LIMIT=FP8_MAX, P_SCALE=P_SCALE, LATE=late, PDL=pdl,
        num_warps=4, num_stages=stages(5 if block_d <= 128 and parts.min_split > 256 else 3), **launch_options(pdl),
    )  # fmt: skip
