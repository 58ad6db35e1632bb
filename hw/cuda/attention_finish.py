"""attention_finish: the parts of decode attention put together, and the quantisation of the result."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.attention_split import Parts, split_range
from hw.cuda.product import SCALE_GROUP, SMALL_STEP, Fp8, launch_options
from hw.cuda.target import FP8, FP8_MAX, launch_next, to_fp8, wait


@triton.jit(do_not_specialize=["num_seqs", "window"])
def attention_finish_kernel(
    parts, stats, query_start, seq_lens, attended, out, out_scale, num_seqs, window,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, SEQS: tl.constexpr,
    SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr, QUANT_MAX: tl.constexpr,
    GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per token, or per few heads where no scale spans the token. Decodes put their parts together."""
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
    if GROUP > 0:
        grouped = tl.reshape(y, (BLOCK_H * BLOCK_D // GROUP, GROUP))
        scales = tl.maximum(tl.max(tl.abs(grouped), 1) / QUANT_MAX, 1e-12)
        group = tl.program_id(1) * (BLOCK_H * BLOCK_D // GROUP) + tl.arange(0, BLOCK_H * BLOCK_D // GROUP)
        tl.store(out_scale + group * tl.num_programs(0) + token, scales, mask=group * GROUP < HEADS * HEAD_DIM)
        y = to_fp8(tl.reshape(grouped * (1.0 / scales)[:, None], (BLOCK_H, BLOCK_D)), QUANT_MAX, out.dtype.element_ty)
    elif QUANT_MAX > 0:
        scale = tl.maximum(tl.max(tl.max(tl.abs(y), 1), 0) / QUANT_MAX, 1e-12)
        tl.store(out_scale + token, scale)
        y = to_fp8(y * (1.0 / scale), QUANT_MAX, out.dtype.element_ty)
    tl.store(out + token * HEADS * HEAD_DIM + at, y.to(out.dtype.element_ty), mask=mask)


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
    width, group = heads * head_dim, 0
    block_h = triton.next_power_of_2(heads) if fp8 else 4
    out_scale = torch.empty(tokens, dtype=torch.float32, device=device) if fp8 else None
    if fp8 and tokens <= SMALL_STEP and width % SCALE_GROUP == 0 and SCALE_GROUP % head_dim == 0:
        group, block_h = SCALE_GROUP, max(4, SCALE_GROUP // head_dim)
        out_scale = torch.empty((width // group, tokens), dtype=torch.float32, device=device)
    attention_finish_kernel[(tokens, triton.cdiv(heads, block_h))](
        parts.values, parts.stats, query_start, seq_lens, attended, result,
        parts.stats if out_scale is None else out_scale, seqs, window or 0,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=triton.next_power_of_2(head_dim),
        SEQS=max(64, triton.next_power_of_2(seqs)), SPLITS=splits, MIN_SPLIT=parts.min_split,
        WINDOW=window is not None, QUANT_MAX=FP8_MAX if fp8 else 0.0,
        GROUP=group, PDL=pdl, num_warps=16 if fp8 and not group else 4, **launch_options(pdl),
    )  # fmt: skip
    return result if out_scale is None else Fp8(result, out_scale)
