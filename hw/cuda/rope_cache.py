"""rope_cache: per-head norm, rotation, and the write of K and V to the paged cache, in one kernel."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.product import Product, launch_options, load_product
from hw.cuda.target import launch_next, to_fp8, wait

HEADS_PER_PROGRAM = 4  # 4 heads of 128 are one warp's 16-byte loads; more programs hide latency at one token
MANY_ROWS = 256  # above: programs enough when each takes several tokens


@triton.jit
def _normed(x, weight, cols, mask, eps, HEAD_DIM: tl.constexpr):
    gain = tl.load(weight + cols, mask=cols < HEAD_DIM, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(tl.where(mask, x * x, 0.0), 1) / HEAD_DIM + eps)[:, None] * gain[None, :]


@triton.jit
def _stored(x, scale, STORE_MAX: tl.constexpr, DTYPE: tl.constexpr):
    if STORE_MAX > 0:
        return to_fp8(x / tl.load(scale), STORE_MAX, DTYPE)
    return x.to(DTYPE)


@triton.jit
def _rotation(rope, positions, row, cols, turned, HALF: tl.constexpr):
    """cos and signed sin of a token's position by column: 1 and 0 beyond the rotary part."""
    angle = tl.load(positions + row).to(tl.int64) * 2 * HALF + cols % HALF
    cos = tl.load(rope + angle, mask=turned, other=1.0)
    sin = tl.load(rope + HALF + angle, mask=turned, other=0.0)
    return cos, tl.where(cols < HALF, -sin, sin)


@triton.jit(do_not_specialize=["rows"])
def rope_cache_kernel(
    values, row_scale, col_scale, bias, rope, positions, slots, q_norm, k_norm, q, k_cache, v_cache, k_scale, v_scale,
    rows, eps,
    SPLITS: tl.constexpr, ROW_SCALED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr, STORE_MAX: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * ROWS
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)
    cols = tl.arange(0, BLOCK_D)
    # The other element of each rotated pair; those beyond the rotary part are their own and are not turned.
    other = tl.where(cols < HALF, cols + HALF, tl.where(cols < 2 * HALF, cols - HALF, cols))
    turned = cols < 2 * HALF
    mask = (head < HEADS + 2 * KV_HEADS)[:, None] & (cols < HEAD_DIM)[None, :]
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    mine = head[:, None] * HEAD_DIM + cols[None, :]
    theirs = head[:, None] * HEAD_DIM + other[None, :]
    is_q = (head < HEADS)[:, None]
    # The step's metadata was written long before: ahead of the wait.
    slot = tl.load(slots + begin).to(tl.int64)
    cos, sin = _rotation(rope, positions, begin, cols, turned, HALF)
    if SCALED and ROWS > 1:  # twice the bytes of a row: loaded once for all rows
        my_scale = tl.load(col_scale + mine, mask=mask, other=0.0)
        their_scale = tl.load(col_scale + theirs, mask=mask, other=0.0)
    wait(PDL)
    launch_next(PDL)
    for row in range(begin, tl.minimum(begin + ROWS, rows)):
        x = load_product(
            values, row_scale, col_scale, bias, row, mine, mask, rows, width,
            SPLITS, ROW_SCALED, SCALED and ROWS == 1, BIASED and not (SCALED and ROWS > 1)
        )  # fmt: skip
        y = load_product(
            values, row_scale, col_scale, bias, row, theirs, mask, rows, width,
            SPLITS, ROW_SCALED, SCALED and ROWS == 1, BIASED and not (SCALED and ROWS > 1)
        )  # fmt: skip
        if SCALED and ROWS > 1:
            x, y = x * my_scale, y * their_scale
            if BIASED:
                x += tl.load(bias + mine, mask=mask, other=0.0).to(tl.float32)
                y += tl.load(bias + theirs, mask=mask, other=0.0).to(tl.float32)
        rotated, partner = x, y
        if NORM:
            rotated = tl.where(is_q, x * _normed(x, q_norm, cols, mask, eps, HEAD_DIM),
                               x * _normed(x, k_norm, cols, mask, eps, HEAD_DIM))  # fmt: skip
            partner = tl.where(is_q, y * _normed(y, q_norm, other, mask, eps, HEAD_DIM),
                               y * _normed(y, k_norm, other, mask, eps, HEAD_DIM))  # fmt: skip
        rotated = rotated * cos[None, :] + partner * sin[None, :]
        tl.store(q + row * HEADS * HEAD_DIM + mine, rotated.to(q.dtype.element_ty), mask=mask & is_q)
        if slot >= 0:
            kv = head - HEADS
            first = slot // BLOCK_SIZE * KV_HEADS * BLOCK_SIZE * HEAD_DIM + slot % BLOCK_SIZE * HEAD_DIM
            place = first + kv[:, None] * (BLOCK_SIZE * HEAD_DIM) + cols[None, :]
            is_k = (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
            k = _stored(rotated, k_scale, STORE_MAX, k_cache.dtype.element_ty)
            tl.store(k_cache + place, k, mask=mask & is_k)
            if STORE_MAX > 0:  # FP8 values lie with the tokens of a block innermost
                first += slot % BLOCK_SIZE * (1 - HEAD_DIM)
                place = first + (kv[:, None] - KV_HEADS) * (BLOCK_SIZE * HEAD_DIM) + cols[None, :] * BLOCK_SIZE
            else:
                place -= KV_HEADS * BLOCK_SIZE * HEAD_DIM
            v = _stored(x, v_scale, STORE_MAX, v_cache.dtype.element_ty)
            tl.store(v_cache + place, v, mask=mask & (head >= HEADS + KV_HEADS)[:, None])
        if ROWS > 1:
            following = tl.minimum(row + 1, rows - 1)
            slot = tl.load(slots + following).to(tl.int64)
            cos, sin = _rotation(rope, positions, following, cols, turned, HALF)


def rope_cache(
    qkv: torch.Tensor | Product,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    pdl: bool = False,
) -> torch.Tensor:
    """qkv [tokens, (hq + 2 hkv) * d] -> q [tokens, hq, d] rotated; writes rotated K, and V, to the cache.

    rope [max_positions, 2, rotary_dim / 2] float32; positions, slots [tokens] int32 (a negative slot writes nothing);
    caches [num_blocks, hkv, block_size, d], plain, or FP8 with scales (stored = value / scale) and then with v_cache
    [num_blocks, hkv, d, block_size].
    """
    product = Product.of(qkv)
    rows, width = product.shape
    block_size = k_cache.shape[2]
    if width != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(f"qkv has {width} columns, not {num_heads} + 2 * {num_kv_heads} heads of {head_dim}")
    if k_cache.numel() != v_cache.numel() or k_cache.shape[1] != num_kv_heads or k_cache.shape[3] != head_dim:
        raise ValueError(f"cache {tuple(k_cache.shape)} does not fit {num_kv_heads} heads of {head_dim}")
    if positions.shape != (rows,) or slots.shape != (rows,) or not rope.is_contiguous() or rope.dtype != torch.float32:
        raise ValueError("positions and slots must have one entry per token, rope must be contiguous float32")
    stored_fp8 = k_cache.dtype.itemsize == 1
    if stored_fp8 and (k_scale is None or v_scale is None):
        raise ValueError("an FP8 cache needs k_scale and v_scale")
    values = product.values
    q = torch.empty((rows, num_heads, head_dim), dtype=product.dtype, device=values.device)
    rows_each = 4 if rows > MANY_ROWS else 1
    rope_cache_kernel[(triton.cdiv(rows, rows_each), triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))](
        *product.pointers(), rope, positions, slots, values if q_norm is None else q_norm,
        values if k_norm is None else k_norm, q, k_cache, v_cache, values if k_scale is None else k_scale,
        values if v_scale is None else v_scale, rows, eps, **product.flags(), HEADS=num_heads, KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim, HALF=rope.shape[2], BLOCK_SIZE=block_size, NORM=q_norm is not None,
        STORE_MAX=torch.finfo(k_cache.dtype).max if stored_fp8 else 0.0, TILE=HEADS_PER_PROGRAM,
        BLOCK_D=triton.next_power_of_2(head_dim), ROWS=rows_each, PDL=pdl,
        num_warps=2 if rows_each == 1 else 4, **launch_options(pdl),
    )  # fmt: skip
    return q
