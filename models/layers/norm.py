"""Norm: the weight of an RMSNorm. The arithmetic is an op, fused with what stands before and after it."""

from __future__ import annotations

import torch

from models.layers.parts import Parts


class Norm:
    """`weight` [size]; `eps` is added to the mean square. Whole on every rank."""

    def __init__(self, parts: Parts, name: str, size: int, eps: float) -> None:
        self.name = name
        self.eps = eps
        self.weight = torch.ones(size, dtype=parts.dtype, device=parts.device)
        self._loaded = False
        parts.weights[name] = self

    def load(self, slot: str, tensor: torch.Tensor) -> None:
        if tensor.shape != self.weight.shape:
            shapes = f"{tuple(tensor.shape)}, the config means {tuple(self.weight.shape)}"
            raise ValueError(f"{self.name}: the checkpoint has {shapes}")
        self.weight.copy_(tensor)
        self._loaded = True

    def missing(self) -> list[str]:
        return [] if self._loaded else ["weight"]

    def fill(self, generator: torch.Generator) -> None:
        self._loaded = True

    @property
    def num_bytes(self) -> int:
        return self.weight.numel() * self.weight.itemsize
