"""silu_mul: the gated activation of the feed-forward block, with the quantisation of its result."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.product import SCALE_GROUP, SMALL_STEP, Fp8, Product, launch_options, sum_parts
from hw.cuda.target import FP8, FP8_MAX, launch_next, to_fp8, wait

ONE_EACH = 132  # multiprocessors of an H200: with more rows, each takes several


@triton.jit(do_not_specialize=["rows"])
def silu_mul_kernel(
    values, row_scale, col_scale, bias, out, out_scale, rows, width,
    SPLITS: tl.constexpr, ROW_SCALED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    QUANT_MAX: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    if SCALED and ROWS > 1:  # twice the bytes of a row: loaded once for all rows
        gate_scale = tl.load(col_scale + cols, mask=mask, other=0.0)
        up_scale = tl.load(col_scale + width + cols, mask=mask, other=0.0)
    wait(PDL)
    launch_next(PDL)
    for row in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, rows)):
        gate = sum_parts(values, row, cols, mask, rows, 2 * width, SPLITS)
        up = sum_parts(values, row, width + cols, mask, rows, 2 * width, SPLITS)
        if ROW_SCALED:
            factor = tl.load(row_scale + row)
            gate, up = gate * factor, up * factor
        if SCALED and ROWS > 1:
            gate, up = gate * gate_scale, up * up_scale
        elif SCALED:
            gate *= tl.load(col_scale + cols, mask=mask, other=0.0)
            up *= tl.load(col_scale + width + cols, mask=mask, other=0.0)
        if BIASED:
            gate += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
            up += tl.load(bias + width + cols, mask=mask, other=0.0).to(tl.float32)
        y = gate / (1.0 + tl.exp(-gate)) * up
        if GROUP > 0:
            grouped = tl.reshape(y, (BLOCK // GROUP, GROUP))
            scales = tl.maximum(tl.max(tl.abs(grouped), 1) / QUANT_MAX, 1e-12)
            group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
            tl.store(out_scale + group * rows + row, scales, mask=group * GROUP < width)
            y = tl.reshape(grouped * (1.0 / scales)[:, None], (BLOCK,))
            y = to_fp8(y, QUANT_MAX, out.dtype.element_ty)
        elif QUANT_MAX > 0:
            scale = tl.maximum(tl.max(tl.abs(y), 0) / QUANT_MAX, 1e-12)
            tl.store(out_scale + row, scale)
            y = to_fp8(y * (1.0 / scale), QUANT_MAX, out.dtype.element_ty)
        tl.store(out + row * width + cols, y.to(out.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor | Product, *, fp8: bool, pdl: bool = False) -> torch.Tensor | Fp8:
    """x [tokens, 2 * n] (gate, up) -> silu(gate) * up [tokens, n], quantised with `fp8`.

    A scale per token needs the whole row in one program; without it, and with a scale per group in small steps, a row
    is split for more parallelism.
    """
    product = Product.of(x)
    rows, width = product.shape[0], product.shape[1] // 2
    if product.shape[1] % 2:
        raise ValueError(f"gate and up must be equally wide, not {product.shape[1]} columns together")
    device = product.values.device
    out = torch.empty((rows, width), dtype=FP8 if fp8 else product.dtype, device=device)
    whole = triton.next_power_of_2(width)
    group, block, warps, rows_each = 0, min(whole, 2048), 4, 1
    scale = None
    if fp8 and rows <= SMALL_STEP and width % SCALE_GROUP == 0:
        group, block = SCALE_GROUP, min(whole, 1024)
        scale = torch.empty((width // group, rows), dtype=torch.float32, device=device)
    elif fp8:
        block = whole
        warps = min(32 if rows > ONE_EACH else 16, max(1, block // 512))
        if block <= 16384:  # then the scales of several rows' columns fit into registers
            rows_each = 1 if rows <= ONE_EACH else 2 if rows <= 1024 else 8
        scale = torch.empty(rows, dtype=torch.float32, device=device)
    silu_mul_kernel[(triton.cdiv(rows, rows_each), triton.cdiv(width, block))](
        *product.pointers(), out, product.values if scale is None else scale, rows, width, **product.flags(),
        QUANT_MAX=FP8_MAX if fp8 else 0.0, GROUP=group, ROWS=rows_each, BLOCK=block, PDL=pdl, num_warps=warps,
        **launch_options(pdl),
    )  # fmt: skip
    return out if scale is None else Fp8(out, scale)
