"""Runs a model step by step over a paged cache, as the runner would, and returns the logits of every position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hw.comm import Comm
from hw.cpu.backend import CpuBackend
from hw.kvcache import KVCachePool, KVLayout
from hw.ops import GroupInputs, HostInputs, StepInputs
from models.layers.decoder import Decoder
from models.runtime.loader import load_model

BLOCK_SIZE = 8


def load(folder: Path, num_positions: int = 128, quantization: str = "none", comm: Comm | None = None) -> Decoder:
    """A float32 model on the CPU."""
    return load_model(
        folder,
        CpuBackend(),
        comm or Comm(),
        dtype=torch.float32,
        quantization=quantization,
        num_positions=num_positions,
    )


@torch.inference_mode()
def logits_of(
    model: Decoder,
    sequences: list[list[int]],
    chunks: list[int],
    stored: torch.dtype = torch.float32,
    set_scales: Callable[[KVCachePool], None] = lambda pool: None,
) -> list[torch.Tensor]:
    """Logits [length, vocab] of each sequence; all sequences advance together by `chunks` tokens, step after step.

    stored: type of the cache, whose scales `set_scales` sets.
    Blocks are handed out in an interleaved order, so that no sequence is contiguous.
    """
    layout = KVLayout.build(model.kv_layers, BLOCK_SIZE, stored)
    per_sequence = max(len(ids) for ids in sequences) // BLOCK_SIZE + 1
    pool = model.parts.backend.make_kv_cache(layout.with_blocks(per_sequence * len(sequences)))
    set_scales(pool)
    tables = [[i * len(sequences) + s for i in range(per_sequence)] for s in range(len(sequences))]
    done = [0] * len(sequences)
    results: list[list[torch.Tensor]] = [[] for _ in sequences]
    step = 0
    while any(done[s] < len(ids) for s, ids in enumerate(sequences)):
        size = chunks[min(step, len(chunks) - 1)]
        step += 1
        parts = [(s, min(size, len(ids) - done[s])) for s, ids in enumerate(sequences) if done[s] < len(ids)]
        parts.sort(key=lambda part: part[1] != 1)
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for s, count in parts:
            span = range(done[s], done[s] + count)
            ids += sequences[s][span.start : span.stop]
            positions += span
            slots += [tables[s][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
            starts.append(len(ids))
        lens = [done[s] + count for s, count in parts]
        rows = [s for s, _ in parts]
        group = GroupInputs(torch.tensor(tables, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32))
        groups = tuple(group for _ in layout.groups)
        inputs = StepInputs(
            rows=torch.tensor(rows, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            groups=groups,
            num_tokens=len(ids),
            num_seqs=len(parts),
            num_decodes=sum(count == 1 for _, count in parts),
            max_query=max(count for _, count in parts),
            max_seq_len=max(lens),
            host=HostInputs(rows, starts, lens, tuple([tables[s] for s, _ in parts] for _ in layout.groups)),
        )
        out = model.logits(model.forward(torch.tensor(ids, dtype=torch.int32), inputs, pool.layers))
        for i, (s, count) in enumerate(parts):
            results[s].append(out[starts[i] : starts[i + 1]])
            done[s] += count
    return [torch.cat(parts) for parts in results]
