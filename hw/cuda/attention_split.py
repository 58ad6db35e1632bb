"""How decode attention is cut along the keys: Parts, and the ranges that the kernels agree on."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TARGET_PROGRAMS = 528  # four per multiprocessor of an H200: fewer leave memory idle, more only add partial results
LOG2E = 1.4426950408889634


@triton.jit
def split_range(length, window, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """(first key, keys per split) of a sequence. The first key is a multiple of 64, so with a window up to 63 keys that
    are not visible come before those that are: ranges then begin with a block, and vectors stay whole."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0) // 64 * 64
    size = tl.maximum(tl.cdiv(length - first, SPLITS), MIN_SPLIT)
    return first, tl.cdiv(size, MIN_SPLIT) * MIN_SPLIT


@dataclass(frozen=True, slots=True)
class Parts:
    """Unfinished decodes: values [tokens, splits, hq, d] and stats (maximum, sum) [tokens, splits, hq, 2] float32."""

    values: torch.Tensor
    stats: torch.Tensor
    min_split: int
    window: int | None


def num_splits(num_seqs: int, num_kv_heads: int) -> tuple[int, int]:
    """(splits, keys of the smallest split) for at most `num_seqs` decodes: enough programs to fill the device."""
    programs = num_seqs * num_kv_heads
    if programs <= TARGET_PROGRAMS // 32:
        return 16, 64
    if programs <= TARGET_PROGRAMS // 8:
        return 8, 64  # latency counts, the partial results are small
    # From here on only long contexts are worth a split; programs without keys end at once, but are not free.
    if programs <= TARGET_PROGRAMS // 2:
        return 8, 256
    return (4, 1024) if programs <= 2 * TARGET_PROGRAMS else (2, 4096)
