"""StepPlan: everything of one step that its layers share: rotations, cache indices, masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from hw.ops import LayerCache, StepInputs

T = TypeVar("T")

MAX_WASTE_TOKENS = 256  # padding worth less than one more gather and attention call (some 30 us) in a group of decodes
MIN_FILL = 0.75  # a decode joins a group of longer ones if it fills this much of their length
MAX_PIECE_QUERIES = 256  # bounds the mask to 256 x keys, and skips most keys after the diagonal


@dataclass(frozen=True, slots=True)
class Decodes:
    """Decode rows of similar length: rows None for all in order; index [rows, kv_heads, blocks].

    hidden: (row, key) pairs of the gathered keys that no query may see; mask, added to their scores, keeps their weight
    at zero. Both None when all are seen. What is hidden may be anybody's, NaN too, and 0 * NaN is NaN: it is zeroed.
    """

    rows: torch.Tensor | None
    index: torch.Tensor
    mask: torch.Tensor | None
    hidden: tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries [start, stop) of the step against the first `keys` gathered keys; mask [stop - start, keys] is added."""

    start: int
    stop: int
    keys: int
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's prefill chunk: index [1, kv_heads, blocks] of the keys that any of its queries sees."""

    index: torch.Tensor
    pieces: list[Piece]


class StepPlan:
    """Built lazily, once per step and kind of layer."""

    def __init__(self, inputs: StepInputs) -> None:
        self.inputs = inputs
        self._made: dict[object, object] = {}

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def rotation(self, rope: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, cos) and (-sin, sin), each [tokens, 1, rotary_dim]: x * cos + swapped halves * sin is the rotation."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            cos, sin = rope[self.inputs.positions].to(dtype)[:, :, None].unbind(1)
            return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

        return self._once(("rotation", rope.data_ptr(), dtype), make)

    def store_index(self, cache: LayerCache) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Where K and V go: rows of the cache seen as [blocks * kv_heads * block_size, d], token-major.

        The first value selects the tokens that are stored, None when all are.
        """
        kv_heads, size = cache.k.shape[1], cache.block_size

        def make() -> tuple[torch.Tensor | None, torch.Tensor]:
            slots = self.inputs.groups[cache.group].slots.long()
            kept = None
            if bool((slots < 0).any()):
                kept = (slots >= 0).nonzero()[:, 0]
                slots = slots[kept]
            heads = torch.arange(kv_heads) * size
            first = slots.div(size, rounding_mode="floor") * (kv_heads * size) + slots % size
            return kept, (first[:, None] + heads).view(-1)

        return self._once(("store", cache.group, kv_heads, size), make)

    def decodes(self, cache: LayerCache, window: int | None, dtype: torch.dtype) -> list[Decodes]:
        """The decode rows of the step in groups of similar length."""
        kv_heads = cache.k.shape[1]
        return self._once(
            ("decodes", cache.group, kv_heads, window, dtype), lambda: self._decodes(cache, kv_heads, window, dtype)
        )

    def _decodes(self, cache: LayerCache, kv_heads: int, window: int | None, dtype: torch.dtype) -> list[Decodes]:
        count, size = self.inputs.num_decodes, cache.block_size
        lens = self.inputs.host.seq_lens
        first = [_first_block(lens[i] - 1, window, size) for i in range(count)]
        spans = [-(-lens[i] // size) - first[i] for i in range(count)]
        tables = self.inputs.host.block_tables[cache.group]
        groups = _similar(spans, size)
        planned: list[Decodes] = []
        for rows in groups:
            width = max(spans[i] for i in rows)
            if len(groups) == 1:
                rows = list(range(count))
            blocks = [tables[i][first[i] : first[i] + spans[i]] + [0] * (width - spans[i]) for i in rows]
            ends = torch.tensor([[lens[i] - first[i] * size] for i in rows])
            keys = torch.arange(width * size)
            hidden = keys >= ends
            if window is not None:
                hidden |= keys < ends - window
            some = bool(hidden.any())
            mask = _additive(hidden, dtype)[:, None, None, :] if some else None
            row, key = hidden.nonzero(as_tuple=True)
            chosen = None if len(groups) == 1 else torch.tensor(rows)
            planned.append(Decodes(chosen, _block_index(blocks, kv_heads), mask, (row, key) if some else None))
        return planned

    def chunks(self, cache: LayerCache, window: int | None, dtype: torch.dtype) -> list[Chunk]:
        """The prefill chunks of the step, one per sequence after the decode rows."""
        kv_heads = cache.k.shape[1]
        return self._once(
            ("chunks", cache.group, kv_heads, window, dtype),
            lambda: [
                self._chunk(cache, kv_heads, window, dtype, i)
                for i in range(self.inputs.num_decodes, self.inputs.num_seqs)
            ],
        )

    def _chunk(self, cache: LayerCache, kv_heads: int, window: int | None, dtype: torch.dtype, seq: int) -> Chunk:
        host, size = self.inputs.host, cache.block_size
        start, stop, length = host.query_start[seq], host.query_start[seq + 1], host.seq_lens[seq]
        base = length - (stop - start)  # position of the chunk's first query
        first = _first_block(base, window, size)
        blocks = host.block_tables[cache.group][seq][first : -(-length // size)]
        pieces = []
        for at in range(start, stop, MAX_PIECE_QUERIES):
            end = min(at + MAX_PIECE_QUERIES, stop)
            position = torch.arange(base + at - start, base + end - start)[:, None] - first * size
            keys = base + end - start - first * size
            key = torch.arange(keys)
            hidden = key > position
            if window is not None:
                hidden |= key <= position - window
            pieces.append(Piece(at, end, keys, _additive(hidden, dtype)))
        return Chunk(_block_index([blocks], kv_heads), pieces)


def _first_block(position: int, window: int | None, size: int) -> int:
    """The first block that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // size


def _block_index(blocks: list[list[int]], kv_heads: int) -> torch.Tensor:
    """Blocks per sequence (equal counts) -> rows [seqs, kv_heads, blocks] of the cache as [blocks * kv_heads, …]."""
    return torch.tensor(blocks)[:, None, :] * kv_heads + torch.arange(kv_heads)[None, :, None]


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _similar(spans: list[int], size: int) -> list[list[int]]:
    """Partition rows by their number of blocks so that padding to a group's longest wastes little."""
    groups: list[list[int]] = []
    widest = waste = 0
    for row in sorted(range(len(spans)), key=lambda i: -spans[i]):
        more = (widest - spans[row]) * size
        if groups and (spans[row] >= MIN_FILL * widest or waste + more <= MAX_WASTE_TOKENS):
            groups[-1].append(row)
            waste += more
        else:
            groups.append([row])
            widest, waste = spans[row], 0
    return groups
