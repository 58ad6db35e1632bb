"""RowState: what the device knows of every row, kept from step to step; StepInputs are made from it.

A Batch carries only what changed. Token ids live on the device as [row, position]: the id that step N draws is written
there and read by step N+1, and never passes through the host on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.messages import NewSequence, RowBlocks, Scheduled
from hw.ops import GroupInputs, HostInputs, StepInputs
from models.runtime.step import BadRow


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """The tokens of a step, padded: ids [tokens] int32, and what the model reads besides them."""

    ids: torch.Tensor
    step: StepInputs


class RowState:
    """Persistent state of `num_rows` rows on a device.

    token_ids [rows, max_len + 1] int32: prompt and output of each row; one place more, for the token drawn last.
    Block tables [rows, max_blocks] int32, one per KV group, on the device; as lists and arrays on the host.
    """

    def __init__(
        self, num_rows: int, max_len: int, vocab_size: int, block_size: int, num_groups: int, device: torch.device
    ) -> None:
        max_blocks = -(-(max_len + 1) // block_size)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.prompt_lens = np.zeros(num_rows, dtype=np.int32)
        self.token_ids = torch.zeros((num_rows, max_len + 1), dtype=torch.int32, device=device)
        self._on_host = device.type == "cpu"  # then host arrays and tensors share their memory
        self._tables = [np.zeros((num_rows, max_blocks), dtype=np.int32) for _ in range(num_groups)]
        self._device_tables = [torch.from_numpy(table).to(device) for table in self._tables]
        self._lists: list[list[list[int]]] = [[[] for _ in range(num_rows)] for _ in range(num_groups)]
        self._device = device

    def groups(self) -> tuple[GroupInputs, ...]:
        """The block tables that every step uses; with no slots, since there is no step."""
        return tuple(GroupInputs(table, table.new_empty(0)) for table in self._device_tables)

    def begin(self, new: NewSequence) -> None:
        """A sequence takes a row. Raises BadRow for ids outside the vocabulary, or more of them than fit."""
        known = np.array(new.prompt_ids + new.output_ids, dtype=np.int64)
        if not 0 < len(new.prompt_ids) <= len(known) <= self.token_ids.shape[1]:
            raise BadRow([new.row], f"a sequence of {len(known)} tokens; a row holds 1 to {self.token_ids.shape[1]}")
        if known.min() < 0 or known.max() >= self.vocab_size:
            bad = int(known[(known < 0) | (known >= self.vocab_size)][0])
            raise BadRow([new.row], f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        ids = torch.from_numpy(known.astype(np.int32))
        self.token_ids[new.row, : len(known)] = ids.to(self._device, non_blocking=True)
        self.prompt_lens[new.row] = len(new.prompt_ids)
        for lists in self._lists:
            lists[new.row] = []

    def set_blocks(self, changes: list[RowBlocks]) -> None:
        """Write block table entries."""
        touched: dict[int, list[tuple[int, int, int]]] = {}
        for change in changes:
            row, start, stop = change.row, change.start, change.start + len(change.block_ids)
            table = self._tables[change.group]
            blocks = self._lists[change.group][row]
            if start > len(blocks) or stop > table.shape[1]:
                raise BadRow([row], f"blocks {start} to {stop} of a table that has {len(blocks)} of {table.shape[1]}")
            blocks[start:stop] = change.block_ids
            table[row, start:stop] = change.block_ids
            touched.setdefault(change.group, []).append((row, start, stop))
        if not self._on_host:
            for group, spans in touched.items():
                self._send_blocks(group, spans)

    def _send_blocks(self, group: int, spans: list[tuple[int, int, int]]) -> None:
        """Copy table entries (row, start, stop) to the device: one transfer, and no wait for what runs there."""
        table = self._tables[group]
        places = np.concatenate([np.arange(row * table.shape[1] + a, row * table.shape[1] + b) for row, a, b in spans])
        entries = np.stack((places, table.reshape(-1)[places]))
        where, values = torch.from_numpy(entries).to(self._device, non_blocking=True).unbind(0)
        self._device_tables[group].view(-1).index_copy_(0, where, values.to(torch.int32))

    def inputs(self, scheduled: list[Scheduled], num_padded: int) -> TokenInputs:
        """What a forward pass over `scheduled` reads. `num_padded`: tokens of the step with padding."""
        count = len(scheduled)
        rows = [s.row for s in scheduled]
        num_decodes = next((i for i, s in enumerate(scheduled) if s.num_tokens != 1), count)
        starts = np.array([s.start for s in scheduled], dtype=np.int32)
        query_start = np.zeros(count + 1, dtype=np.int32)
        row_array = np.array(rows, dtype=np.int32)
        if num_decodes == count:
            nums = np.ones(count, dtype=np.int32)
            query_start[1:] = np.arange(1, count + 1)
            token_rows, positions = row_array, starts
        else:
            nums = np.array([s.num_tokens for s in scheduled], dtype=np.int32)
            np.cumsum(nums, out=query_start[1:])
            token_rows = np.repeat(row_array, nums)
            within = np.arange(query_start[-1], dtype=np.int32) - np.repeat(query_start[:-1], nums)
            positions = np.repeat(starts, nums) + within
        seq_lens = starts + nums
        num_tokens = int(query_start[-1])
        places, offsets = np.divmod(positions, self.block_size)
        slots = [table[token_rows, places] * self.block_size + offsets for table in self._tables]
        lens = seq_lens.tolist()
        parts = [row_array, query_start, seq_lens]
        parts += [_padded(x, num_padded, 0) for x in (positions, token_rows)]
        parts += [_padded(x, num_padded, -1) for x in slots]
        on_device = self._sent(parts)
        groups = tuple(map(GroupInputs, self._device_tables, on_device[5:]))
        step = StepInputs(
            rows=on_device[0],
            query_start=on_device[1],
            seq_lens=on_device[2],
            positions=on_device[3],
            groups=groups,
            num_tokens=num_tokens,
            num_seqs=count,
            num_decodes=num_decodes,
            max_query=int(nums.max()),
            max_seq_len=max(lens),
            host=HostInputs(
                rows, query_start.tolist(), lens, tuple([lists[row] for row in rows] for lists in self._lists)
            ),
        )
        return TokenInputs(self.token_ids[on_device[4], on_device[3]], step)

    def put_drawn(self, rows: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> None:
        """Write the ids [m] that were drawn for `rows` at `positions`; all on the device."""
        self.token_ids[rows, positions] = ids.to(torch.int32)

    def _sent(self, parts: list[NDArray[np.int32]]) -> list[torch.Tensor]:
        """The arrays on the device: one transfer, whatever their number."""
        if self._on_host:
            return [torch.from_numpy(part) for part in parts]
        whole = torch.from_numpy(np.concatenate(parts)).to(self._device, non_blocking=True)
        return list(torch.split(whole, [len(part) for part in parts]))


def _padded(values: NDArray[np.int32], length: int, filler: int) -> NDArray[np.int32]:
    if len(values) == length:
        return values
    result = np.full(length, filler, dtype=np.int32)
    result[: len(values)] = values
    return result
