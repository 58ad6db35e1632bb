"""Linear: a (fused, sharded, maybe quantised) matrix product whose weight knows how to load each checkpoint tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hw.ops import ActFormat, Activation
from hw.quant.scaled import DTYPE, Scaled
from hw.quant.scheme import AdoptsFp8, Packed, Scheme
from models.layers.parts import Parts


@dataclass(frozen=True, slots=True)
class Slot:
    """One checkpoint tensor in a fused weight: `full` output rows; this rank keeps [start, start + count)."""

    full: int
    start: int
    count: int


class Linear:
    """x [tokens, k] -> [tokens, n]; n is the slots' rows of this rank, one after the other.

    Args:
        name: of the weight, for the loader and for errors.
        slots: slot name -> Slot, in the order of the output.
        num_in: columns of the whole weight; `columns` [start, count) are this rank's (row-parallel), None for all.
        bias: whether there is one. A row-parallel layer adds it on rank 0 only, since the ranks' results are summed.
        reduce: sum the result over the ranks (row-parallel).
    """

    def __init__(
        self,
        parts: Parts,
        name: str,
        slots: dict[str, Slot],
        num_in: int,
        *,
        columns: tuple[int, int] | None = None,
        bias: bool = False,
        reduce: bool = False,
        scheme: Scheme | None = None,
    ) -> None:
        self.name = name
        self._parts = parts
        self._scheme = scheme or parts.scheme_of(name)
        self._slots = slots
        self._num_in = num_in
        self._columns = columns or (0, num_in)
        self._reduce = reduce and parts.comm.size > 1
        self._num_out = sum(slot.count for slot in slots.values())
        self._scheme.check(self._num_out, self._columns[1], name)
        self._plain: torch.Tensor | None = None
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None  # e4m3 [n, k], scales [n]
        self._packed: Packed = ()
        self._pending = {f"{slot}.weight" for slot in slots}
        self._bias: torch.Tensor | None = None
        if bias:
            self._bias = torch.zeros(self._num_out, dtype=parts.dtype, device=parts.device)
            self._pending |= {f"{slot}.bias" for slot in slots}
        parts.weights[name] = self

    @property
    def input_format(self) -> ActFormat:
        """The form in which the input is wanted; whoever makes it fuses the conversion."""
        return self._scheme.input_format

    def __call__(self, x: Activation) -> Activation:
        backend = self._parts.backend
        bias = self._bias if not self._reduce or self._parts.comm.rank == 0 else None
        result = self._scheme.apply(backend.ops, x, self._packed, bias)
        return backend.all_reduce(result, self._parts.comm) if self._reduce else result

    # ------------------------------------------------------------------------------------------ loading

    def load(self, slot: str, tensor: torch.Tensor) -> None:
        """`slot`: "q.weight", "gate.bias", … Packs the weight as soon as its last slot is there."""
        place, at = self._check(slot, tuple(tensor.shape))
        rows = slice(place.start, place.start + place.count)
        if slot.endswith(".bias"):
            assert self._bias is not None
            self._bias[at : at + place.count] = tensor[rows]
        else:
            first, count = self._columns
            self._weight(self._parts.dtype)[at : at + place.count] = tensor[rows, first : first + count]
        self._loaded(slot)

    def load_scaled(self, slot: str, tensor: Scaled) -> None:
        """A slot's ready-made FP8 weight. Kept as it is where the scheme adopts it; otherwise dequantised and packed.

        The scheme has one scale per output channel: scales per block are folded into the weight in float32, which is
        then quantised once more.
        """
        place, at = self._check(slot, tuple(tensor.values.shape))
        share = tensor.share((place.start, place.count), self._columns).to(self._parts.device)
        adopts = isinstance(self._scheme, AdoptsFp8)
        if adopts and share.block is None:
            values, scale = self._adopted()
            values[at : at + place.count] = share.values
            scale[at : at + place.count] = share.scale[:, 0]
        else:
            dtype = torch.float32 if adopts else self._parts.dtype
            self._weight(dtype)[at : at + place.count] = share.plain()
        self._loaded(slot)

    def missing(self) -> list[str]:
        return sorted(self._pending)

    def fill(self, generator: torch.Generator) -> None:
        weight = self._weight(self._parts.dtype)
        weight.normal_(0, 0.02, generator=generator)
        if self._bias is not None:
            self._bias.normal_(0, 0.02, generator=generator)
        self._pending.clear()
        self._pack()

    @property
    def num_bytes(self) -> int:
        tensors = [*self._packed, *([self._bias] if self._bias is not None else [])]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def _check(self, slot: str, shape: tuple[int, ...]) -> tuple[Slot, int]:
        """The place of a checkpoint tensor and its first row in the fused weight. Raises ValueError for its shape."""
        name, _, kind = slot.partition(".")
        place = self._slots[name]
        want = (place.full, self._num_in) if kind == "weight" else (place.full,)
        if shape != want:
            raise ValueError(f"{self.name} {slot}: the checkpoint has {shape}, the config means {want}")
        return place, self._offset(name)

    def _loaded(self, slot: str) -> None:
        self._pending.discard(slot)
        if slot.endswith(".weight") and not any(part.endswith(".weight") for part in self._pending):
            self._pack()

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        if self._plain is None:
            shape = (self._num_out, self._columns[1])
            self._plain = torch.empty(shape, dtype=dtype, device=self._parts.device)
        return self._plain

    def _adopted(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._ready is None:
            device = self._parts.device
            values = torch.empty((self._num_out, self._columns[1]), dtype=DTYPE, device=device)
            self._ready = values, torch.empty(self._num_out, dtype=torch.float32, device=device)
        return self._ready

    def _pack(self) -> None:
        if self._ready is None:
            self._packed = self._scheme.pack(self._weight(self._parts.dtype))
        elif self._plain is not None:
            raise ValueError(f"{self.name}: its parts are stored in different forms, which one product cannot have")
        elif isinstance(self._scheme, AdoptsFp8):
            self._packed = self._scheme.adopt(*self._ready)
        self._plain = self._ready = None

    def _offset(self, name: str) -> int:
        offset = 0
        for other, slot in self._slots.items():
            if other == name:
                return offset
            offset += slot.count
        raise KeyError(name)


def column_parallel(parts: Parts, name: str, outputs: dict[str, int], num_in: int, *, bias: bool = False) -> Linear:
    """Outputs shared among the ranks; each rank sees the whole input."""
    slots = {}
    for slot, full in outputs.items():
        start, count = parts.share(full, f"{name} {slot}")
        slots[slot] = Slot(full, start, count)
    return Linear(parts, name, slots, num_in, bias=bias)


def row_parallel(parts: Parts, name: str, num_out: int, num_in: int, *, bias: bool = False) -> Linear:
    """Inputs shared among the ranks; the results are summed."""
    columns = parts.share(num_in, name)
    return Linear(parts, name, {"": Slot(num_out, 0, num_out)}, num_in, columns=columns, bias=bias, reduce=True)
