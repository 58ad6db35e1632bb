"""sample: one id per row by argmax of logits / T plus Gumbel noise, in two launches for any number of rows.

The noise of an id depends on the row's key and on the id alone, so how a row is split among programs changes nothing.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
MAX_PARTS = 64


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def gumbel_noise(ids, key0, key1):
    """-log(-log(u)) for u in (0, 1) from the keys (uint32) and ids: see hw.ops.Ops.sample."""
    k = (_mix(_mix(ids.to(tl.uint32) ^ key0) + key1) >> 8).to(tl.int32)
    high = k >= 1 << 23
    w = (tl.where(high, 0xFFFFFF - k, k).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    # log1p(-w) from log alone: 1 - w rounds, and w / (what was really subtracted) corrects for it.
    rest = 1.0 - w
    lost = 1.0 - rest
    log1p = tl.where(lost == 0.0, -w, tl.log(rest) * w / tl.where(lost == 0.0, 1.0, lost))
    return -tl.log(-tl.where(high, log1p, tl.log(w)))


@triton.jit
def sample_part_kernel(
    logits, temperature, key0, key1, best, best_id, vocab, part_size, RANDOM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    t = 0.0
    k0 = tl.zeros((), tl.uint32)
    k1 = tl.zeros((), tl.uint32)
    if RANDOM:
        t = tl.load(temperature + row)
        k0 = tl.load(key0 + row).to(tl.uint32, bitcast=True)
        k1 = tl.load(key1 + row).to(tl.uint32, bitcast=True)
    lane = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    top_id = part * part_size + lane
    end = tl.minimum(part * part_size + part_size, vocab)
    for start in range(part * part_size, end, BLOCK):
        ids = start + lane
        x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < end, other=-float("inf")).to(tl.float32)
        if RANDOM:  # noqa: SIM102 (the outer one is a compile-time branch)
            if t > 0.0:
                x = x / t + gumbel_noise(ids, k0, k1)
        better = x > top  # strictly: each lane sees its ids in rising order, so the lowest of equals stays
        top = tl.where(better, x, top)
        top_id = tl.where(better, ids, top_id)
    value = tl.max(top, 0)
    chosen = tl.min(tl.where(top == value, top_id, 0x7FFFFFFF), 0)
    at = row * tl.num_programs(1) + part
    tl.store(best + at, value)
    tl.store(best_id + at, chosen)


@triton.jit
def sample_join_kernel(best, best_id, out, num_parts, vocab, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    mask = part < num_parts
    top = tl.load(best + row * num_parts + part, mask=mask, other=-float("inf"))
    ids = tl.load(best_id + row * num_parts + part, mask=mask, other=0x7FFFFFFF)
    chosen = tl.min(tl.where(top == tl.max(top, 0), ids, 0x7FFFFFFF), 0)
    tl.store(out + row, tl.minimum(chosen, vocab - 1))  # a row of NaN has no maximum; any id is better than none


def sample(
    logits: torch.Tensor, temperature: torch.Tensor | None, key0: torch.Tensor | None, key1: torch.Tensor | None
) -> torch.Tensor:
    """logits [m, vocab] -> ids [m] int32. temperature [m] float32 (0: argmax, the lowest id on a tie), keys [m] int32;
    without them every row takes its argmax."""
    rows, vocab = logits.shape
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")
    random = temperature is not None and key0 is not None and key1 is not None
    # About two waves of an H200: one program alone reads a row of 128k in tens of microseconds.
    parts = min(MAX_PARTS, triton.cdiv(vocab, BLOCK), max(1, triton.cdiv(264, rows)))
    part_size = triton.cdiv(triton.cdiv(vocab, parts), BLOCK) * BLOCK
    parts = triton.cdiv(vocab, part_size)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    best_id = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int32, device=logits.device)
    sample_part_kernel[(rows, parts)](
        logits, temperature if random else logits, key0 if random else logits, key1 if random else logits,
        best, best_id, vocab, part_size, RANDOM=random, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    sample_join_kernel[(rows,)](best, best_id, out, parts, vocab, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return out
