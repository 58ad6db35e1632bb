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

from hw.cuda.product import SCALE_GROUP, SMALL_STEP, Fp8, Product, launch_options
from hw.cuda.target import fp8_dot, launch_next, stages, wait

TILE_K = SCALE_GROUP
MAX_OWN_OUTPUTS = 10240  # wider products have tiles enough without a split, and cuBLASLt is at the limit
TILE_N = 64


@triton.jit(do_not_specialize=["tokens"])
def fp8_linear_kernel(
    x, x_scale, weight, parts, tokens, num_out, num_in, split_in,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, TILE_K: tl.constexpr, GROUPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    # Rows past the last read the last one and are not stored: unmasked loads are copied asynchronously.
    out = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    n = tl.minimum(out, num_out - 1)
    m = tl.arange(0, TILE_M)
    k = split * split_in + tl.arange(0, TILE_K)
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    weights = weight + n[:, None] * num_in + k[None, :]
    inputs = x + m[None, :] * num_in + k[:, None]
    groups = x_scale + split * split_in // TILE_K * tokens + m
    real = m < tokens
    first = tl.load(weights)  # no kernel writes weights: their first tile is under way while the previous kernel ends
    wait(PDL)
    launch_next(PDL)
    first_inputs = tl.load(inputs, mask=real[None, :], other=0.0)
    if GROUPED:
        first_scale = tl.load(groups, mask=real, other=0.0)
        scale = tl.load(groups + tokens, mask=real & (split_in > TILE_K), other=0.0)
    for at in range(TILE_K, split_in, TILE_K):
        w = tl.load(weights + at)
        a = tl.load(inputs + at, mask=real[None, :], other=0.0)
        if GROUPED:
            following = tl.load(groups + (at // TILE_K + 1) * tokens, mask=real & (at + TILE_K < split_in), other=0.0)
            acc += fp8_dot(w, a, tl.zeros((TILE_N, TILE_M), tl.float32)) * scale[None, :]
            scale = following
        else:
            acc = fp8_dot(w, a, acc)
    if GROUPED:
        acc += fp8_dot(first, first_inputs, tl.zeros((TILE_N, TILE_M), tl.float32)) * first_scale[None, :]
    else:
        acc = fp8_dot(first, first_inputs, acc)
    where = (split * tokens + m)[:, None] * num_out + out[None, :]
    tl.store(parts + where, tl.trans(acc).to(parts.dtype.element_ty), mask=real[:, None] & (out < num_out)[None, :])


def splits_for(num_out: int, num_in: int) -> int | None:
    """Parts along K, enough for 192 programs where whole tiles allow it; None when K is not made of whole tiles."""
    if num_in % TILE_K:
        return None
    splits = 1
    while triton.cdiv(num_out, TILE_N) * splits < 192 and splits < 8 and num_in % (2 * splits * TILE_K) == 0:
        splits *= 2
    return splits


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

    Scales of x per group are applied here, those per token by the consumer. unit: float32 scalar 1 on the device, the
    scale of the per-tensor product.
    """
    tokens, num_in = x.values.shape
    num_out = weight.shape[0]
    if weight.shape != (num_out, num_in) or scale.shape != (num_out,) or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} with scale {tuple(scale.shape)} does not fit {num_in} inputs")
    grouped = x.scale.dim() == 2
    splits = None
    if grouped or (tokens <= SMALL_STEP and num_out <= MAX_OWN_OUTPUTS):
        splits = splits_for(num_out, num_in)
    if splits is None:
        if grouped:
            raise ValueError(f"{num_in} inputs in groups of {SCALE_GROUP}: there must be whole groups")
        parts = torch._scaled_mm(
            x.values, weight.t(), scale_a=unit, scale_b=unit, out_dtype=dtype, use_fast_accum=True
        ).unsqueeze(0)
        return Product(parts, dtype, x.scale, scale, bias)
    parts = torch.empty((splits, tokens, num_out), dtype=torch.float32, device=weight.device)
    fp8_linear_kernel[(triton.cdiv(num_out, TILE_N), splits)](
        x.values, x.scale, weight, parts, tokens, num_out, num_in, num_in // splits, TILE_N=TILE_N,
        TILE_M=max(16, triton.next_power_of_2(tokens)), TILE_K=TILE_K, GROUPED=grouped, PDL=pdl, num_warps=4,
        num_stages=stages(4), **launch_options(pdl),
    )  # fmt: skip
    return Product(parts, dtype, None if grouped else x.scale, scale, bias)
