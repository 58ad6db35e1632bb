"""embed: rows of the embedding table."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def embed_kernel(ids, table, out, vocab, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids + row).to(tl.int64)
    known = (index >= 0) & (index < vocab)
    x = tl.load(table + index * width + cols, mask=known & (cols < width), other=0.0)
    tl.store(out + row.to(tl.int64) * width + cols, x, mask=cols < width)


def embed(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [tokens], table [vocab, hidden] -> [tokens, hidden]; ids outside the table give 0."""
    vocab, width = table.shape
    out = torch.empty((ids.shape[0], width), dtype=table.dtype, device=table.device)
    block = min(1024, triton.next_power_of_2(width))
    grid = (ids.shape[0], triton.cdiv(width, block))
    embed_kernel[grid](ids, table, out, vocab, width, BLOCK=block, num_warps=4)
    return out
