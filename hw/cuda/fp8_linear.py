"""fp8_linear: e4m3 activations times e4m3 weights; scales, split-K sums and bias are left to the consumer.

Small token counts use an own kernel. The weight is the left operand: with fewer than 64 rows on the left, the compiler
falls back to converting e4m3 to float16, while on the right 16 columns are enough for native FP8 products. K is split
so that every multiprocessor streams weights. Large counts go to cuBLASLt, per-tensor with unit scales, which is faster
than its row-wise form; bfloat16 keeps float32's range, so the unscaled result cannot overflow.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hw.cuda.product import Fp8, Product, launch_options
from hw.cuda.target import INTERPRET, launch_next, wait

MAX_OWN_TOKENS = 32  # above, cuBLASLt wins
TILE_K = 256
MAX_OWN_OUTPUTS = 10240  # wider products have tiles enough without a split, and cuBLASLt is at the limit
TILE_N = 64


@triton.jit(do_not_specialize=["tokens"])
def fp8_linear_kernel(
    x, weight, parts, tokens, num_out, num_in, split_in,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    m = tl.arange(0, TILE_M)
    k = split * split_in + tl.arange(0, TILE_K)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    weights = weight + n[:, None] * num_in + k[None, :]
    inputs = x + m[None, :] * num_in + k[:, None]
    wait(PDL)
    launch_next(PDL)
    for at in range(0, split_in, TILE_K):
        w = tl.load(weights + at)
        a = tl.load(inputs + at, mask=(m < tokens)[None, :], other=0.0)
        if INTERPRET:  # noqa: SIM108 (a compile-time branch)
            acc = tl.dot(w.to(tl.float32), a.to(tl.float32), acc)
        else:
            acc = tl.dot(w, a, acc)
    where = (split * tokens + m)[:, None] * num_out + n[None, :]
    tl.store(parts + where, tl.trans(acc).to(parts.dtype.element_ty), mask=(m < tokens)[:, None])


def splits_for(num_out: int, num_in: int) -> int | None:
    """Parts along K that give at least 192 programs, or None when the shape cannot be cut into whole tiles."""
    if num_out % TILE_N or num_out > MAX_OWN_OUTPUTS:
        return None
    splits = 1
    while num_out // TILE_N * splits < 192 and splits < 8:
        splits *= 2
    return splits if num_in % (splits * TILE_K) == 0 else None


def fp8_linear(
    x: Fp8,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    unit: torch.Tensor,
    *,
    pdl: bool = False,
) -> Product:
    """x [tokens, k] with its scales; weight [n, k] e4m3, scale [n] float32 -> Product [tokens, n] of `dtype`.

    unit: float32 scalar 1 on the device, the scale of the per-tensor product.
    """
    tokens, num_in = x.values.shape
    num_out = weight.shape[0]
    if weight.shape != (num_out, num_in) or scale.shape != (num_out,) or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} with scale {tuple(scale.shape)} does not fit {num_in} inputs")
    splits = splits_for(num_out, num_in) if tokens <= MAX_OWN_TOKENS else None
    if splits is not None:
        parts = torch.empty((splits, tokens, num_out), dtype=torch.float32, device=weight.device)
        fp8_linear_kernel[(num_out // TILE_N, splits)](
            x.values, weight, parts, tokens, num_out, num_in, num_in // splits, TILE_N=TILE_N,
            TILE_M=max(16, triton.next_power_of_2(tokens)), TILE_K=TILE_K, PDL=pdl, num_warps=4, num_stages=4,
            **launch_options(pdl),
        )  # fmt: skip
    else:
        parts = torch._scaled_mm(
            x.values, weight.t(), scale_a=unit, scale_b=unit, out_dtype=dtype, use_fast_accum=True
        ).unsqueeze(0)
    return Product(parts, dtype, x.scale, scale, bias)
