"""add_rms_norm: residual addition, RMSNorm, and the quantisation of its result, in one pass over a row."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.product import Fp8, Product, launch_options, load_product
from hw.cuda.target import FP8, FP8_MAX, launch_next, to_fp8, wait


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_kernel(
    values, row_scale, col_scale, bias, residual, weight, new_residual, out, out_scale, rows, width, eps,
    SPLITS: tl.constexpr, ROW_SCALED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    ADD: tl.constexpr, QUANT_MAX: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    gain = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)  # no kernel writes it: before the wait
    wait(PDL)
    launch_next(PDL)
    x = load_product(
        values, row_scale, col_scale, bias, row, cols, mask, rows, width, SPLITS, ROW_SCALED, SCALED, BIASED
    )
    if ADD:
        x += tl.load(residual + row * width + cols, mask=mask, other=0.0).to(tl.float32)
        kept = x.to(new_residual.dtype.element_ty)
        tl.store(new_residual + row * width + cols, kept, mask=mask)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps) * gain
    if QUANT_MAX > 0:
        scale = tl.maximum(tl.max(tl.abs(y), 0) / QUANT_MAX, 1e-12)
        tl.store(out_scale + row, scale)
        y = to_fp8(y * (1.0 / scale), QUANT_MAX, out.dtype.element_ty)
    tl.store(out + row * width + cols, y.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: Product, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, fp8: bool, pdl: bool
) -> tuple[torch.Tensor | Fp8, torch.Tensor]:
    rows, width = x.shape
    if weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} does not fit rows of {width}")
    device = x.values.device
    out = torch.empty((rows, width), dtype=FP8 if fp8 else x.dtype, device=device)
    scale = torch.empty(rows, dtype=torch.float32, device=device) if fp8 else None
    new_residual = out
    if residual is not None:
        if residual.shape != (rows, width) or not residual.is_contiguous():
            raise ValueError(f"residual {tuple(residual.shape)} does not match x {(rows, width)}")
        new_residual = torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    add_rms_norm_kernel[(rows,)](
        *x.pointers(), x.values if residual is None else residual, weight, new_residual, out,
        x.values if scale is None else scale, rows, width, eps, **x.flags(), ADD=residual is not None,
        QUANT_MAX=FP8_MAX if fp8 else 0.0, BLOCK=block, PDL=pdl,
        num_warps=16 if block >= 4096 else max(1, block // 256), **launch_options(pdl),
    )  # fmt: skip
    return (out if scale is None else Fp8(out, scale)), new_residual


def add_rms_norm(
    x: torch.Tensor | Product, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, fp8: bool, pdl: bool = False
) -> tuple[torch.Tensor | Fp8, torch.Tensor]:
    """residual' = residual + x -> (residual' / rms(residual') * weight, residual').

    x: Product or tensor [tokens, hidden]; residual [tokens, hidden]; weight [hidden]. With `fp8` the first result is
    quantised with a scale per token.
    """
    return _launch(Product.of(x), residual, weight, eps, fp8, pdl)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, fp8: bool, pdl: bool = False) -> torch.Tensor | Fp8:
    """x [tokens, hidden] -> x / rms(x) * weight, quantised per token with `fp8`."""
    return _launch(Product.of(x), None, weight, eps, fp8, pdl)[0]
