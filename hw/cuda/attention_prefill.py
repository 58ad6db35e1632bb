"""attention_prefill: causal paged attention of chunks of more than one query token, any mix of them in one launch.

A program takes a tile of queries of one sequence and one K/V head; its rows are (query, head of the group), so that
grouped heads share each K and V tile. Which sequence a tile belongs to is worked out on the device: the grid is only
an upper bound that follows from the padded size of the step.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.attention_decode import dot_dtype, product_operands
from hw.cuda.attention_decode_fp8 import P_SCALE
from hw.cuda.attention_split import LOG2E
from hw.cuda.product import launch_options
from hw.cuda.target import FP8_MAX, fp8_dot, launch_next, to_fp8, wait


@triton.jit
def load_keys(pointers, mask, WHOLE: tl.constexpr):
    """Keys or values; only unmasked loads are copied asynchronously."""
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_seqs", "window"])
def attention_prefill_kernel(
    q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale, v_scale, out, num_seqs,
    table_width, window, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, TILE_G: tl.constexpr, TILE_M: tl.constexpr, TILE: tl.constexpr,
    SEQS: tl.constexpr, WINDOW: tl.constexpr, FP8_CACHE: tl.constexpr, LIMIT: tl.constexpr, P_SCALE: tl.constexpr,
    DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = TILE_M // TILE_G
    SAME: tl.constexpr = min(BLOCK_SIZE, TILE)  # keys of a tile that follow each other in one block
    # Longest work first would be better still; reversed at least puts the late, long tiles of a chunk ahead.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    index = tl.arange(0, SEQS)
    inside = index < num_seqs
    starts = tl.load(query_start + index, mask=inside, other=0)
    counts = tl.load(query_start + index + 1, mask=inside, other=0) - starts
    tiles = tl.where(counts > 1, tl.cdiv(counts, QUERIES), 0)
    ends = tl.cumsum(tiles, 0)
    seq = tl.sum((ends <= pid).to(tl.int32), 0)
    wait(PDL)
    launch_next(PDL)
    if seq < num_seqs:
        tile = pid - tl.sum(tl.where(index < seq, tiles, 0), 0)
        start = tl.load(query_start + seq)
        count = tl.load(query_start + seq + 1) - start
        base = tl.load(seq_lens + seq) - count
        row = tl.load(rows + seq).to(tl.int64)
        m = tl.arange(0, TILE_M)
        d = tl.arange(0, BLOCK_D)
        keys = tl.arange(0, TILE)
        query = tile * QUERIES + m // TILE_G
        g = m % TILE_G
        real = (query < count) & (g < GROUP)
        in_dim = d < HEAD_DIM
        at = ((start + query) * HEADS + kv_head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
        x = tl.load(q + at, mask=real[:, None] & in_dim[None, :], other=0.0)
        position = base + query
        end = base + tl.minimum(tile * QUERIES + QUERIES, count)
        begin = 0
        if WINDOW:
            begin = tl.maximum(base + tile * QUERIES - window + 1, 0) // TILE * TILE
        if FP8_CACHE:  # both products in FP8; queries and probabilities as in attention_decode_fp8
            FP8: tl.constexpr = k_cache.dtype.element_ty
            x = x.to(tl.float32)
            query_scale = tl.maximum(tl.max(tl.abs(x), 1) / LIMIT, 1e-20)
            x = x / query_scale[:, None]
            queries = to_fp8(x, LIMIT, FP8)
            queries_rest = to_fp8(x - queries.to(tl.float32), LIMIT, FP8)
            factor = query_scale * (scale * tl.load(k_scale))
        else:
            queries = product_operands(x, DOT)
        top = tl.full((TILE_M,), -1e30, tl.float32)  # finite: a row may see none of its first keys through a window
        total = tl.zeros((TILE_M,), tl.float32)
        acc = tl.zeros((TILE_M, BLOCK_D), tl.float32)
        for first in range(begin, end, TILE):
            key = first + keys
            block = tl.load(block_tables + row * table_width + key // BLOCK_SIZE, mask=key < end, other=0)
            block = tl.max_constancy(block, SAME).to(tl.int64)
            origin = (block * KV_HEADS + kv_head) * (BLOCK_SIZE * HEAD_DIM)
            within = key % BLOCK_SIZE
            place = (origin + within * HEAD_DIM)[:, None] + d[None, :]
            k = load_keys(k_cache + place, in_dim[None, :], BLOCK_D == HEAD_DIM)
            if FP8_CACHE:
                v = load_keys(v_cache + (origin + within)[None, :] + d[:, None] * BLOCK_SIZE, in_dim[:, None],
                              BLOCK_D == HEAD_DIM)  # fmt: skip
                scores = fp8_dot(queries, tl.trans(k), tl.zeros((TILE_M, TILE), tl.float32))
                scores = fp8_dot(queries_rest, tl.trans(k), scores) * factor[:, None]
            else:
                v = load_keys(v_cache + place, in_dim[None, :], BLOCK_D == HEAD_DIM)
                scores = tl.dot(queries, tl.trans(product_operands(k, DOT)), input_precision="ieee") * scale
            visible = key[None, :] <= position[:, None]
            if WINDOW:
                visible = visible & (key[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(scores - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            if FP8_CACHE:
                p = p * P_SCALE
                rounded = to_fp8(p, LIMIT, FP8)
                acc = fp8_dot(rounded, tl.trans(v), acc)
                acc = fp8_dot(to_fp8(p - rounded.to(tl.float32), LIMIT, FP8), tl.trans(v), acc)
            else:
                acc = tl.dot(product_operands(p, DOT), product_operands(v, DOT), acc, input_precision="ieee")
            top = new_top
        if FP8_CACHE:
            acc = acc * (tl.load(v_scale) / P_SCALE)
        result = acc / tl.maximum(total, 1e-30)[:, None]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=real[:, None] & in_dim[None, :])


def attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    rows: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None,
    *,
    out: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Writes out [tokens, hq, d] for the tokens of every sequence that has more than one; leaves the others alone.

    Arguments as in attention_decode. The chunk's own K and V must be in the cache already.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    seqs = rows.shape[0]
    if heads % kv_heads or k_cache.numel() != v_cache.numel() or k_cache.shape[3] != head_dim:
        raise ValueError(f"{heads} heads of {head_dim} do not fit a cache of {tuple(k_cache.shape)}")
    if out.shape != q.shape or not (out.is_contiguous() and q.is_contiguous()):
        raise ValueError("q and out must be equal in shape and contiguous")
    scaled = k_cache.dtype.itemsize == 1
    if scaled and (k_scale is None or v_scale is None):
        raise ValueError("an FP8 cache needs k_scale and v_scale")
    group = heads // kv_heads
    tile_g = triton.next_power_of_2(group)
    block_d = triton.next_power_of_2(head_dim)
    tile_m = 64 if scaled or tokens * heads <= 16384 or block_d > 128 else 128
    if q.dtype == torch.float32:
        tile_m = max(16, tile_g)
    queries = tile_m // tile_g
    # Each chunk has two tokens or more, and at most one tile that is not full.
    grid = triton.cdiv(tokens, queries) + min(seqs, tokens // 2)
    attention_prefill_kernel[(grid, kv_heads)](
        q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale if scaled else seq_lens,
        v_scale if scaled else seq_lens, out, seqs, block_tables.stride(0), window or 0, scale * LOG2E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, GROUP=group,
        TILE_G=tile_g, TILE_M=tile_m, TILE=32 if q.dtype == torch.float32 or block_d > 128 else 64,
        SEQS=max(64, triton.next_power_of_2(seqs)), WINDOW=window is not None, FP8_CACHE=scaled, LIMIT=FP8_MAX,
        P_SCALE=P_SCALE, DOT=dot_dtype(q),
        PDL=pdl, num_warps=8 if tile_m == 128 else 4, num_stages=2, **launch_options(pdl),
    )  # fmt: skip
