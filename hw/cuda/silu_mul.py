"""silu_mul: the gated activation of the feed-forward block, with the quantisation of its result."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.product import Fp8, Product, launch_options, load_product
from hw.cuda.target import FP8, FP8_MAX, launch_next, to_fp8, wait


@triton.jit(do_not_specialize=["rows"])
def silu_mul_kernel(
    values, row_scale, col_scale, bias, out, out_scale, rows, width,
    SPLITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, QUANT_MAX: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    wait(PDL)
    launch_next(PDL)
    gate = load_product(
        values, row_scale, col_scale, bias, row, cols, mask, rows, 2 * width, SPLITS, SCALED, BIASED
    )  # fmt: skip
    up = load_product(
        values, row_scale, col_scale, bias, row, width + cols, mask, rows, 2 * width, SPLITS, SCALED, BIASED
    )  # fmt: skip
    y = gate / (1.0 + tl.exp(-gate)) * up
    if QUANT_MAX > 0:
        scale = tl.maximum(tl.max(tl.abs(y), 0) / QUANT_MAX, 1e-12)
        tl.store(out_scale + row, scale)
        y = to_fp8(y * (1.0 / scale), QUANT_MAX, out.dtype.element_ty)
    tl.store(out + row * width + cols, y.to(out.dtype.element_ty), mask=mask)


def silu_mul(x: torch.Tensor | Product, *, fp8: bool, pdl: bool = False) -> torch.Tensor | Fp8:
    """x [tokens, 2 * n] (gate, up) -> silu(gate) * up [tokens, n], quantised per token with `fp8`.

    A scale per token needs the whole row in one program; without it a row is split for more parallelism.
    """
    product = Product.of(x)
    rows, width = product.shape[0], product.shape[1] // 2
    if product.shape[1] % 2:
        raise ValueError(f"gate and up must be equally wide, not {product.shape[1]} columns together")
    device = product.values.device
    out = torch.empty((rows, width), dtype=FP8 if fp8 else product.dtype, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device) if fp8 else None
    whole = triton.next_power_of_2(width)
    block = whole if fp8 else min(whole, 2048)
    silu_mul_kernel[(rows, triton.cdiv(width, block))](
        *product.pointers(), out, product.values if scale is None else scale, rows, width, **product.flags(),
        QUANT_MAX=FP8_MAX if fp8 else 0.0, BLOCK=block, PDL=pdl,
        num_warps=(min(16, max(1, block // 512)) if block <= 16384 else 32) if fp8 else 4, **launch_options(pdl),
    )  # fmt: skip
    return out if scale is None else Fp8(out, scale)
