"""attention_decode: paged attention of sequences with one query token, split along the keys.

A program takes one sequence, one K/V head and one range of keys; the query heads that share the K/V head are the rows
of its products. How many ranges there are depends on the padded size of the step alone: the grid holds no data.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.attention_decode_fp8 import attention_decode_fp8
from hw.cuda.attention_split import LOG2E, Parts, num_splits, split_range
from hw.cuda.product import launch_options
from hw.cuda.target import INTERPRET, launch_next, stages, wait, wait_at_end


@triton.jit
def product_operands(x, DOT: tl.constexpr):
    """x as the tensor cores want it; the interpreter's half-precision products are wrong, so there it is float32."""
    if INTERPRET:
        return x.to(tl.float32)
    return x.to(DOT)


@triton.jit
def attention_decode_kernel(
    q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, parts, stats, table_width, window, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, TILE_G: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, DOT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
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
        g = tl.arange(0, TILE_G)
        d = tl.arange(0, BLOCK_D)
        keys = tl.arange(0, TILE)
        in_group = g < GROUP
        in_dim = d < HEAD_DIM
        head = kv_head * GROUP + g
        at = (token * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
        query = product_operands(tl.load(q + at, mask=in_group[:, None] & in_dim[None, :], other=0.0), DOT)
        top = tl.full((TILE_G,), -1e30, tl.float32)  # finite: the first keys of a window may all be hidden
        total = tl.zeros((TILE_G,), tl.float32)
        acc = tl.zeros((TILE_G, BLOCK_D), tl.float32)
        for start in range(begin, end, TILE):
            key = start + keys
            visible = key < end
            block = tl.load(block_tables + row * table_width + key // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
            # Keys past the end read block 0, which is allocated and finite: unmasked loads are copied asynchronously.
            place = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_DIM
            if BLOCK_D == HEAD_DIM:
                k = tl.load(k_cache + place[:, None] + d[None, :])
                v = tl.load(v_cache + place[:, None] + d[None, :])
            else:
                k = tl.load(k_cache + place[:, None] + d[None, :], mask=in_dim[None, :], other=0.0)
                v = tl.load(v_cache + place[:, None] + d[None, :], mask=in_dim[None, :], other=0.0)
            scores = tl.dot(query, tl.trans(product_operands(k, DOT)), input_precision="ieee") * scale
            if WINDOW:
                visible = visible & (key >= length - window)
            scores = tl.where(visible[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(scores - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(product_operands(p, DOT), product_operands(v, DOT), acc * shrink[:, None],
                         input_precision="ieee")  # fmt: skip
            top = new_top
        part = (token * SPLITS + split) * HEADS + head
        tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], acc, mask=in_group[:, None] & in_dim[None, :])
        tl.store(stats + part * 2, top, mask=in_group)
        tl.store(stats + part * 2 + 1, total, mask=in_group)
    if LATE:
        wait_at_end(PDL)


def dot_dtype(q: torch.Tensor) -> tl.dtype:
    """The type of the products over a cache of q's type."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[q.dtype]


def attention_decode(
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
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    late: bool = False,
    pdl: bool = False,
) -> Parts:
    """Attention of the sequences that have one query token; attention_finish makes the result of it.

    q [tokens, hq, d]; caches [num_blocks, hkv, block_size, d], but FP8 values [num_blocks, hkv, d, block_size];
    block_tables [state rows, max_blocks]; rows, seq_lens [seqs], query_start [seqs + 1] int32. Sequences without tokens
    are padding. late: the kernel launched before has waited for everything that is read here, so it may still run; it
    has ended when this one has.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    seqs = rows.shape[0]
    if heads % kv_heads or k_cache.numel() != v_cache.numel() or k_cache.shape[3] != head_dim:
        raise ValueError(f"{heads} heads of {head_dim} do not fit a cache of {tuple(k_cache.shape)}")
    if query_start.shape != (seqs + 1,) or seq_lens.shape != (seqs,) or block_tables.stride(1) != 1:
        raise ValueError("rows, seq_lens [seqs], query_start [seqs + 1] and row-major block tables are needed")
    group = heads // kv_heads
    splits, min_split = num_splits(seqs, kv_heads)
    values = torch.empty((tokens, splits, heads, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((tokens, splits, heads, 2), dtype=torch.float32, device=q.device)
    parts = Parts(values, stats, min_split, window)
    if k_cache.dtype.itemsize == 1:
        if k_scale is None or v_scale is None:
            raise ValueError("an FP8 cache needs k_scale and v_scale")
        attention_decode_fp8(
            q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale, v_scale, scale, parts,
            late=late, pdl=pdl,
        )  # fmt: skip
        return parts
    block_d = triton.next_power_of_2(head_dim)
    row_bytes = k_cache.dtype.itemsize * block_d
    attention_decode_kernel[(seqs, kv_heads, splits)](
        q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, values, stats, block_tables.stride(0),
        window or 0, scale * LOG2E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, GROUP=group,
        TILE_G=max(16, triton.next_power_of_2(group)), TILE=64 if row_bytes <= 512 else 32, SPLITS=splits,
        MIN_SPLIT=min_split, WINDOW=window is not None, DOT=dot_dtype(q), LATE=late, PDL=pdl,
        num_warps=4, num_stages=stages(3), **launch_options(pdl),
    )  # fmt: skip
    return parts
