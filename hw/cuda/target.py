"""What kernels must know of where they run, as compile-time constants."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter: bf16 arithmetic and bf16 dots are wrong there, so kernels widen what they load."""

HIP = torch.version.hip is not None

FP8 = torch.float8_e4m3fnuz if HIP else torch.float8_e4m3fn
"""MI300X multiplies only the fnuz form natively; the other one would be emulated through float16."""

FP8_MAX = 240.0 if HIP else 448.0


def stages(wanted: int) -> int:
    """How many tiles a kernel loads ahead, where `wanted` is right for 100 KiB of shared memory and more: AMD's 64 KiB
    hold one tile beside the one in registers."""
    return min(wanted, 2) if HIP else wanted


@triton.jit
def wait(PDL: tl.constexpr):
    """Before the first read of what the previous kernel wrote. Every kernel of the chain must wait, or a later one
    could read before an earlier one has finished."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_at_end(PDL: tl.constexpr):
    """Instead of `wait`, for a kernel that reads nothing of the previous one: its end must still be the later one. The
    last program waits for all of them: each would hold its place on the device until the previous kernel has ended."""
    if PDL:
        last = (tl.program_id(0) == tl.num_programs(0) - 1) & (tl.program_id(1) == tl.num_programs(1) - 1)
        if last & (tl.program_id(2) == tl.num_programs(2) - 1):
            tl.extra.cuda.gdc_wait()


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Let the next kernel start once all programs of this one run; it still waits for this one's writes.

    Called after `wait`. Calling it before, together with an L2 prefetch of the next weight, made a decode step at one
    sequence 10 % slower; the two have not been measured apart.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def to_fp8(x, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """float32 x, saturated at LIMIT, as FP8. The interpreter loses the carry of a mantissa that rounds up to the next
    power of two, so there the value is rounded to 3 bits first."""
    x = tl.clamp(x, -LIMIT, LIMIT)
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def fp8_dot(a, b, acc):
    """acc + a @ b on FP8 operands. Native where a has 64 rows or more."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)
