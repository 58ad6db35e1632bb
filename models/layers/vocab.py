"""Vocab: the embedding table and the output layer, shared among the ranks by rows of the vocabulary."""

from __future__ import annotations

import torch

from hw.quant.none import Plain
from models.layers.parts import Parts

MAX_COPY = 64 << 20  # bytes of a table of which a CPU keeps a second form, for products; embedding needs whole rows


class VocabTable:
    """This rank's rows of a [vocab, hidden] table; the last rank's are padded with zeros to an equal share."""

    def __init__(self, parts: Parts, name: str, vocab_size: int, hidden_size: int) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.count = -(-vocab_size // parts.comm.size)
        self.start = parts.comm.rank * self.count
        self.table = torch.zeros(self.count, hidden_size, dtype=parts.dtype, device=parts.device)
        self._loaded = False
        parts.weights[name] = self

    def load(self, slot: str, tensor: torch.Tensor) -> None:
        want = (self.vocab_size, self.table.shape[1])
        if tuple(tensor.shape) != want:
            raise ValueError(f"{self.name}: the checkpoint has {tuple(tensor.shape)}, the config means {want}")
        mine = tensor[self.start : self.start + self.count]
        self.table[: mine.shape[0]] = mine
        self._loaded = True

    def missing(self) -> list[str]:
        return [] if self._loaded else ["weight"]

    def fill(self, generator: torch.Generator) -> None:
        rows = max(0, min(self.count, self.vocab_size - self.start))
        self.table[:rows].normal_(0, 0.02, generator=generator)
        self._loaded = True

    @property
    def num_bytes(self) -> int:
        return self.table.numel() * self.table.itemsize


class Embedding:
    """ids [tokens] -> [tokens, hidden]."""

    def __init__(self, parts: Parts, table: VocabTable) -> None:
        self._parts = parts
        self._table = table

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        backend, comm = self._parts.backend, self._parts.comm
        if comm.size == 1:
            return backend.ops.embed(ids, self._table.table)
        return backend.all_reduce(backend.ops.embed(ids - self._table.start, self._table.table), comm)


class Head:
    """hidden [m, hidden] -> logits [m, vocab] of the model's dtype, whole on every rank. Never quantised."""

    def __init__(self, parts: Parts, table: VocabTable) -> None:
        self._parts = parts
        self._table = table
        self._weight: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        comm = self._parts.comm
        if self._weight is None:  # the table is loaded by now
            table = self._table.table
            self._weight = Plain().pack(table)[0] if table.nbytes <= MAX_COPY else table
        logits: torch.Tensor = self._parts.backend.ops.linear(hidden, self._weight, None)
        if comm.size > 1:
            logits = comm.all_gather(logits)[:, : self._table.vocab_size]
        return logits
