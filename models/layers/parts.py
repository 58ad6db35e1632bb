"""Parts: the collaborators that every layer's constructor takes. There are no globals to reach for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hw.backend import Backend
from hw.comm import Comm
from hw.quant.scheme import Scheme
from models.layers.sharing import share


class Weight(Protocol):
    """Something that checkpoint tensors are loaded into, slot by slot. Unloaded slots are errors at the end."""

    def load(self, slot: str, tensor: torch.Tensor) -> None:
        """Take this rank's share of a whole checkpoint tensor. Raises ValueError when its shape is wrong."""
        ...

    def missing(self) -> list[str]:
        """Slots that nothing was loaded into."""
        ...

    def fill(self, generator: torch.Generator) -> None:
        """Random values instead of a checkpoint (--load-format dummy)."""
        ...

    @property
    def num_bytes(self) -> int:
        """Device memory that it takes."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """`scheme` is for the Linears of the layers, except those that `keeps_plain` names, which stay in the model's dtype
    (`plain`). `weights` collects every Weight by its name, for the loader."""

    backend: Backend
    comm: Comm
    scheme: Scheme
    plain: Scheme
    dtype: torch.dtype
    weights: dict[str, Weight] = field(default_factory=dict)
    keeps_plain: Callable[[str], bool] = lambda name: False

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.backend.device

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of a Linear."""
        return self.plain if self.keeps_plain(name) else self.scheme

    def share(self, total: int, what: str) -> tuple[int, int]:
        """This rank's [start, count) of `total` equal parts. Raises ValueError when they cannot be shared equally."""
        return share(total, self.comm.rank, self.comm.size, what)
