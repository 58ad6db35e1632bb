"""StepGraphs: the forward pass as captured graphs, one per padded token count and kind of step.

A captured kernel keeps its grid and its addresses, so a step's inputs are copied into buffers that stay. What is left
over of a buffer describes nothing: sequences without tokens, tokens without a slot.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,unused-ignore"
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from hw.ops import GroupInputs, HostInputs, LayerCache, StepInputs

Forward = Callable[[torch.Tensor, StepInputs, list[LayerCache]], torch.Tensor]
BLOCK = 1024


def step_sizes(max_tokens: int) -> list[int]:
    """Padded token counts. The scheduler fills what is padding otherwise with prompt tokens.

    Above 256 only counts at which the FP8 products are fast: cuBLASLt takes 31 % longer for 448 tokens than for 512, as
    long for 704 as for 768, and longer for 832 than for 896 (8B shapes, H200, torch 2.11).
    """
    large = [320, 384, 512, 640, 768, *range(1024, max_tokens, 256)]
    sizes = [*range(1, 9), *range(16, 65, 8), *range(80, 257, 16), *large]
    return [size for size in sizes if size < max_tokens] + [max_tokens]


@triton.jit(do_not_specialize=[
    "ids", "positions", "slots", "rows", "query_start", "seq_lens", "tokens", "padded", "seqs", "room"])  # fmt: skip
def stage_kernel(
    ids, positions, slots, rows, query_start, seq_lens,
    to_ids, to_positions, to_slots, to_rows, to_query_start, to_seq_lens, tokens, padded, seqs, room,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, real = i < padded, i < tokens
    tl.store(to_ids + i, tl.load(ids + i, mask=real, other=0), mask=token)
    tl.store(to_positions + i, tl.load(positions + i, mask=real, other=0), mask=token)
    tl.store(to_slots + i, tl.load(slots + i, mask=real, other=-1), mask=token)
    seq, known = i < room, i < seqs
    tl.store(to_rows + i, tl.load(rows + i, mask=known, other=0), mask=seq)
    tl.store(to_seq_lens + i, tl.load(seq_lens + i, mask=known, other=0), mask=seq)
    tl.store(to_query_start + i, tl.load(query_start + i, mask=i <= seqs, other=tokens), mask=i <= room)


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph and where it leaves the hidden states."""

    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor


class StepGraphs:
    """A Forward that replays. The model runner pads its steps with `pad`.

    Args:
        forward: what is captured.
        max_tokens, max_seqs: of one step.
    """

    def __init__(self, forward: Forward, device: torch.device, max_tokens: int, max_seqs: int) -> None:
        self.sizes = step_sizes(max_tokens)
        self.num_replays = 0
        self._forward = forward
        self._max_seqs = max_seqs
        self._ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._slots: list[torch.Tensor] = []
        self._rows = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros_like(self._rows)
        self._query_start = torch.zeros(max_seqs + 1, dtype=torch.int32, device=device)
        self._captured: dict[tuple[int, bool], Captured] = {}

    def pad(self, tokens: int) -> int:
        """The size of the graph that a step of `tokens` replays."""
        return self.sizes[bisect_left(self.sizes, tokens)]

    def capture(self, groups: tuple[GroupInputs, ...], caches: list[LayerCache]) -> None:
        """Capture every size. groups: the block tables that all later steps use; their slots do not matter."""
        self._slots = [torch.full_like(self._ids, -1) for _ in groups]
        self._query_start.zero_()
        self._seq_lens.zero_()
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        most_decodes = self.pad(min(self._max_seqs, self.sizes[-1]))
        # The largest first: the smaller ones then fit into the memory that it left in the pool.
        for size in reversed(self.sizes):
            for mixed in (True, False):
                if (size == 1 and mixed) or (size > most_decodes and not mixed):
                    continue
                inputs = self._inputs(size, mixed, groups)
                with torch.cuda.stream(stream):
                    self._forward(self._ids[:size], inputs, caches)  # compiles, and lets libraries allocate
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    hidden = self._forward(self._ids[:size], inputs, caches)
                self._captured[size, mixed] = Captured(graph, hidden)
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, ids: torch.Tensor, inputs: StepInputs, caches: list[LayerCache]) -> torch.Tensor:
        """See models.runtime.runner.Forward; ids are padded to `pad`. The result is overwritten by the next call."""
        if not self._captured:
            self.capture(inputs.groups, caches)
        size, mixed = ids.shape[0], inputs.max_query > 1
        captured = self._captured[size, mixed]
        room = min(size, self._max_seqs)
        for at, group in enumerate(inputs.groups):
            stage_kernel[(triton.cdiv(max(size, room + 1), BLOCK),)](
                ids, inputs.positions, group.slots, inputs.rows, inputs.query_start, inputs.seq_lens,
                self._ids, self._positions, self._slots[at], self._rows, self._query_start, self._seq_lens,
                inputs.num_tokens, size, inputs.num_seqs, room, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        captured.graph.replay()
        self.num_replays += 1
        return captured.hidden

    def _inputs(self, size: int, mixed: bool, groups: tuple[GroupInputs, ...]) -> StepInputs:
        room = min(size, self._max_seqs)
        return StepInputs(
            rows=self._rows[:room],
            query_start=self._query_start[: room + 1],
            seq_lens=self._seq_lens[:room],
            positions=self._positions[:size],
            groups=tuple(replace(group, slots=slots[:size]) for group, slots in zip(groups, self._slots, strict=True)),
            num_tokens=size,
            num_seqs=room,
            num_decodes=0 if mixed else room,
            max_query=size if mixed else 1,
            max_seq_len=0,
            host=HostInputs([], [], [], ()),
        )
