"""Scheme: how a Linear's weight is stored and multiplied. One file per scheme in this folder.

A Linear gives its scheme the plain weight of this rank once it is loaded; `pack` returns what is kept, and `apply`
multiplies by it. Quantising while loading therefore needs no more memory than one plain weight at a time. A scheme that
AdoptsFp8 also takes ready-made FP8 weights of a checkpoint as they are.
"""

from __future__ import annotations

import importlib
from typing import Protocol, runtime_checkable

import torch

from hw.backend import Capabilities
from hw.ops import ActFormat, Activation, Ops

SCHEMES = {
    "none": "hw.quant.none",
    "fp8": "hw.quant.fp8",
    "int8": "hw.quant.int8",
    "int4": "hw.quant.int4",
}

Packed = tuple[torch.Tensor, ...]


class Scheme(Protocol):
    """One weight format. Stateless: the packed tensors belong to the Linear."""

    name: str
    input_format: ActFormat
    """The form in which `apply` wants its input."""

    def check(self, num_out: int, num_in: int, name: str) -> None:
        """Raise QuireError model_invalid when a weight of this shape (this rank's share) cannot be packed."""
        ...

    def pack(self, weight: torch.Tensor) -> Packed:
        """weight [n, k] in the model's dtype -> the tensors that are kept."""
        ...

    def apply(self, ops: Ops, x: Activation, packed: Packed, bias: torch.Tensor | None) -> Activation:
        """x [tokens, k] -> [tokens, n]."""
        ...


@runtime_checkable
class AdoptsFp8(Protocol):
    """A scheme whose packed form is e4m3 with a scale per output channel: a checkpoint's is taken over, value by value
    the same."""

    def adopt(self, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        """values [n, k] e4m3fn, scale [n] float32 (weight = values * scale) -> the tensors that are kept."""
        ...


def make_scheme(name: str, capabilities: Capabilities) -> Scheme:
    """The scheme of --quantization on a device. Raises QuireError invalid_config if the device does not have it."""
    if name not in SCHEMES or name not in capabilities.schemes:
        raise capabilities.refusal("quantization", name, capabilities.schemes)
    scheme: Scheme = importlib.import_module(SCHEMES[name]).make(capabilities)
    return scheme
