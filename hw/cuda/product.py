"""Product: a matrix product that its consumer finishes. Fp8: values with a scale per token.

An FP8 product is fastest when it neither sums its split-K parts nor scales its result: whoever reads it next does both
in registers, which saves a kernel and a trip through memory.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hw.cuda.target import launch_next, wait

SMALL_STEP = 32  # tokens up to which fp8_linear has an own kernel, and its producers need not see a whole row
SCALE_GROUP = 256


@dataclass(frozen=True, slots=True)
class Fp8:
    """values [tokens, n] e4m3 and their float32 scales: [tokens], or in small steps [n / SCALE_GROUP, tokens], one for
    every SCALE_GROUP values, so that several programs can make one token. values * scale is meant."""

    values: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """sum(values, 0) * row_scale[:, None] * col_scale + bias is meant.

    values [splits, tokens, n] in the model's dtype or float32; row_scale [tokens], col_scale [n] float32 or None.
    """

    values: torch.Tensor
    dtype: torch.dtype
    row_scale: torch.Tensor | None = None
    col_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @staticmethod
    def of(x: torch.Tensor | Product) -> Product:
        """A plain tensor [tokens, n] as a product of one part."""
        return x if isinstance(x, Product) else Product(x.contiguous().unsqueeze(0), x.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, n)."""
        return self.values.shape[1], self.values.shape[2]

    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What kernels take; absent tensors stand as `values` and are not read."""
        values = self.values
        return (
            values,
            values if self.row_scale is None else self.row_scale,
            values if self.col_scale is None else self.col_scale,
            values if self.bias is None else self.bias,
        )

    def flags(self) -> dict[str, int | bool]:
        """The compile-time arguments of `load_product`."""
        return {
            "SPLITS": self.values.shape[0],
            "ROW_SCALED": self.row_scale is not None,
            "SCALED": self.col_scale is not None,
            "BIASED": self.bias is not None,
        }


@triton.jit
def sum_parts(values, row, cols, mask, rows, width, SPLITS: tl.constexpr):
    """The sum of the parts of elements `cols` of one `row` in float32, unscaled; masked ones are 0."""
    x = tl.load(values + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        x += tl.load(values + (s * rows + row) * width + cols, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_product(
    values, row_scale, col_scale, bias, row, cols, mask, rows, width,
    SPLITS: tl.constexpr, ROW_SCALED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Finished elements `cols` of one `row` in float32; `row` and `cols` broadcast, masked ones are 0."""
    x = sum_parts(values, row, cols, mask, rows, width, SPLITS)
    if ROW_SCALED:
        x = x * tl.load(row_scale + row)
    if SCALED:
        x = x * tl.load(col_scale + cols, mask=mask, other=0.0)
    if BIASED:
        x += tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def finish_kernel(
    values, row_scale, col_scale, bias, out, rows, width,
    SPLITS: tl.constexpr, ROW_SCALED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    wait(PDL)
    launch_next(PDL)
    x = load_product(
        values, row_scale, col_scale, bias, row, cols, mask, rows, width, SPLITS, ROW_SCALED, SCALED, BIASED
    )
    tl.store(out + row * width + cols, x.to(out.dtype.element_ty), mask=mask)


def finish(x: torch.Tensor | Product, pdl: bool = False) -> torch.Tensor:
    """x -> [tokens, n] in the model's dtype, for a consumer that cannot finish it (a sum over ranks)."""
    if isinstance(x, torch.Tensor):
        return x
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.values.device)
    block = min(1024, triton.next_power_of_2(width))
    finish_kernel[(rows, triton.cdiv(width, block))](
        *x.pointers(), out, rows, width, **x.flags(), BLOCK=block, PDL=pdl, num_warps=4, **launch_options(pdl)
    )
    return out


def launch_options(pdl: bool) -> dict[str, bool]:
    """Launch keywords of a kernel that takes part in dependent launches."""
    return {"launch_pdl": True} if pdl else {}
