"""attention_decode: paged attention of sequences with one query token, split along the keys.

A program takes one sequence, one K/V head and one range of keys; the query heads that share the K/V head are the rows
of its products. How many ranges there are depends on the padded size of the step alone: the grid holds no data.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hw.cuda.product import Fp8, launch_options
from hw.cuda.target import FP8, FP8_MAX, INTERPRET, launch_next, to_fp8, wait

TARGET_PROGRAMS = 528  # four per multiprocessor of an H200: fewer leave memory idle, more only add partial results
LOG2E = 1.4426950408889634


@triton.jit
def split_range(length, window, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """(first visible key, keys per split) of a sequence; also how the parts are put together again."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    size = tl.maximum(tl.cdiv(length - first, SPLITS), MIN_SPLIT)
    return first, tl.cdiv(size, MIN_SPLIT) * MIN_SPLIT


@triton.jit
def product_operands(x, DOT: tl.constexpr):
    """x as the tensor cores want it; the interpreter's half-precision products are wrong, so there it is float32."""
    if INTERPRET:
        return x.to(tl.float32)
    return x.to(DOT)


@triton.jit
def attention_decode_kernel(
    q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale, v_scale, parts, stats, table_width, window,
    scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, TILE_G: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
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
        factor = scale
        if SCALED:
            factor = scale * tl.load(k_scale)
        top = tl.full((TILE_G,), -float("inf"), tl.float32)
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
            scores = tl.dot(query, tl.trans(product_operands(k, DOT)), input_precision="ieee") * factor
            scores = tl.where(visible[None, :], scores, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(scores - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(product_operands(p, DOT), product_operands(v, DOT), acc * shrink[:, None],
                         input_precision="ieee")  # fmt: skip
            top = new_top
        if SCALED:
            acc = acc * tl.load(v_scale)
        part = (token * SPLITS + split) * HEADS + head
        tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], acc, mask=in_group[:, None] & in_dim[None, :])
        tl.store(stats + part * 2, top, mask=in_group)
        tl.store(stats + part * 2 + 1, total, mask=in_group)


@triton.jit(do_not_specialize=["num_seqs", "window"])
def attention_finish_kernel(
    parts, stats, query_start, seq_lens, attended, out, out_scale, num_seqs, window,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, SEQS: tl.constexpr,
    SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, QUANT_MAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token (per few heads when nothing is quantised): decode tokens put their parts together."""
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask = (head < HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    at = head[:, None] * HEAD_DIM + d[None, :]
    used = 0
    if SPLITS > 1:
        seq = tl.arange(0, SEQS)
        inside = seq < num_seqs
        starts = tl.load(query_start + seq, mask=inside, other=-1)
        ends = tl.load(query_start + seq + 1, mask=inside, other=-1)
        # Lengths of padding sequences are 0, and they own no token.
        length = tl.sum(tl.where((starts == token) & (ends == token + 1),
                                 tl.load(seq_lens + seq, mask=inside, other=0), 0), 0)  # fmt: skip
        first, size = split_range(length, window, SPLITS, MIN_SPLIT, WINDOW)
        used = tl.cdiv(length - first, size)
    wait(PDL)
    launch_next(PDL)
    if used == 0:
        y = tl.load(attended + token * HEADS * HEAD_DIM + at, mask=mask, other=0.0).to(tl.float32)
    else:
        # The maximum first: the loads of the parts then depend on nothing and are under way together.
        split = tl.arange(0, SPLITS)
        live = (head < HEADS)[:, None] & (split < used)[None, :]
        pair = ((token * SPLITS + split)[None, :] * HEADS + head[:, None]) * 2
        top = tl.maximum(tl.max(tl.load(stats + pair, mask=live, other=-float("inf")), 1), -1e30)
        total = tl.zeros((BLOCK_H,), tl.float32)
        y = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for s in tl.static_range(SPLITS):
            part = (token * SPLITS + s) * HEADS
            here = (head < HEADS) & (s < used)
            share = tl.exp2(tl.load(stats + (part + head) * 2, mask=here, other=-float("inf")) - top)
            total += share * tl.load(stats + (part + head) * 2 + 1, mask=here, other=0.0)
            x = tl.load(parts + part * HEAD_DIM + at, mask=mask & (s < used), other=0.0)
            y += x * share[:, None]
        y = y / tl.maximum(total, 1e-30)[:, None]
        y = tl.where(mask, y, 0.0)
    if QUANT_MAX > 0:
        scale = tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0) / QUANT_MAX, 1e-12)
        tl.store(out_scale + token, scale)
        y = to_fp8(y * (1.0 / scale), QUANT_MAX, out.dtype.element_ty)
    tl.store(out + token * HEADS * HEAD_DIM + at, y.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Parts:
    """Unfinished decodes: values [tokens, splits, hq, d] and stats (maximum, sum) [tokens, splits, hq, 2] float32."""

    values: torch.Tensor
    stats: torch.Tensor
    min_split: int
    window: int | None


def num_splits(num_seqs: int, num_kv_heads: int) -> tuple[int, int]:
    """(splits, keys of the smallest split) for at most `num_seqs` decodes: enough programs to fill the device."""
    programs = num_seqs * num_kv_heads
    if programs <= TARGET_PROGRAMS // 8:
        return 8, 64  # latency counts, the partial results are small
    # From here on only long contexts are worth a split; programs without keys end at once, but are not free.
    if programs <= TARGET_PROGRAMS // 2:
        return 8, 256
    return (4, 1024) if programs <= 2 * TARGET_PROGRAMS else (2, 4096)


def dot_dtype(q: torch.Tensor, cache: torch.Tensor) -> tl.dtype:
    """The type of the products. e4m3 converts to float16 in one instruction, to bfloat16 in several."""
    if cache.dtype.itemsize == 1:
        return tl.float16
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
    pdl: bool = False,
) -> Parts:
    """Attention of the sequences that have one query token; attention_finish makes the result of it.

    q [tokens, hq, d]; caches [num_blocks, hkv, block_size, d]; block_tables [state rows, max_blocks];
    rows, seq_lens [seqs], query_start [seqs + 1] int32. Sequences without tokens are padding.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    seqs = rows.shape[0]
    if heads % kv_heads or k_cache.shape != v_cache.shape or k_cache.shape[3] != head_dim:
        raise ValueError(f"{heads} heads of {head_dim} do not fit a cache of {tuple(k_cache.shape)}")
    if query_start.shape != (seqs + 1,) or seq_lens.shape != (seqs,) or block_tables.stride(1) != 1:
        raise ValueError("rows, seq_lens [seqs], query_start [seqs + 1] and row-major block tables are needed")
    group = heads // kv_heads
    splits, min_split = num_splits(seqs, kv_heads)
    block_d = triton.next_power_of_2(head_dim)
    parts = torch.empty((tokens, splits, heads, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((tokens, splits, heads, 2), dtype=torch.float32, device=q.device)
    scaled = k_scale is not None
    row_bytes = k_cache.dtype.itemsize * block_d
    tile = 128 if row_bytes < 256 else 64 if row_bytes <= 512 else 32
    attention_decode_kernel[(seqs, kv_heads, splits)](
        q, k_cache, v_cache, block_tables, rows, query_start, seq_lens, k_scale if scaled else seq_lens,
        v_scale if scaled else seq_lens, parts, stats, block_tables.stride(0), window or 0, scale * LOG2E,
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, GROUP=group,
        TILE_G=max(16, triton.next_power_of_2(group)), TILE=tile, SPLITS=splits, MIN_SPLIT=min_split,
        WINDOW=window is not None, SCALED=scaled, DOT=dot_dtype(q, k_cache), PDL=pdl,
        num_warps=4, num_stages=2 if tile == 128 else 3, **launch_options(pdl),
    )  # fmt: skip
    return Parts(parts, stats, min_split, window)


def attention_finish(
    parts: Parts,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    attended: torch.Tensor,
    *,
    fp8: bool = False,
    pdl: bool = False,
) -> torch.Tensor | Fp8:
    """Every token's result [tokens, hq * d]: decodes from their parts, the others from `attended` [tokens, hq, d]."""
    tokens, splits, heads, head_dim = parts.values.shape
    seqs = seq_lens.shape[0]
    device, window = attended.device, parts.window
    result = torch.empty((tokens, heads * head_dim), dtype=FP8 if fp8 else attended.dtype, device=device)
    out_scale = torch.empty(tokens, dtype=torch.float32, device=device) if fp8 else None
    block_h = triton.next_power_of_2(heads) if fp8 else 4
    attention_finish_kernel[(tokens, triton.cdiv(heads, block_h))](
        parts.values, parts.stats, query_start, seq_lens, attended, result,
        parts.stats if out_scale is None else out_scale, seqs, window or 0,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=triton.next_power_of_2(head_dim),
        SEQS=max(64, triton.next_power_of_2(seqs)), SPLITS=splits, MIN_SPLIT=parts.min_split,
        WINDOW=window is not None, QUANT_MAX=FP8_MAX if fp8 else 0.0,
        PDL=pdl, num_warps=16 if fp8 else 4, **launch_options(pdl),
    )  # fmt: skip
    return result if out_scale is None else Fp8(result, out_scale)
