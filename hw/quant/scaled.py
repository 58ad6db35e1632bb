"""Scaled: a ready-made FP8 weight of a checkpoint, with its scales as they were stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Scaled:
    """values [n, k] e4m3; the weight is values * scale.

    scale: float32, [n, 1] (a scale per tensor is repeated), or one per block [rows of blocks, columns of blocks].
    block: (rows, columns) of a block, None for a scale per row. first: (row, column) of values[0, 0] within its block
    grid, for shares that begin inside of a block.
    """

    values: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int] | None = None
    first: tuple[int, int] = (0, 0)

    @staticmethod
    def build(name: str, values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> Scaled:
        """Check shapes and values of what a checkpoint holds. Raises ValueError naming the tensor."""
        if values.dtype != DTYPE or values.dim() != 2:
            kind = f"{values.dtype} {tuple(values.shape)}"
            raise ValueError(f"{name} has a scale, but is {kind}, not a float8_e4m3fn matrix")
        rows, columns = values.shape
        scale = scale.float()
        if not bool(torch.isfinite(scale).all() and (scale >= 0).all()):
            raise ValueError(f"{name}: a scale is negative or not finite")
        if block is not None:
            want = (-(-rows // block[0]), -(-columns // block[1]))
            if tuple(scale.shape) != want:
                size = f"{block[0]} x {block[1]}"
                raise ValueError(f"{name}: its scales are {tuple(scale.shape)}; blocks of {size} need {want}")
            return Scaled(values, scale, block)
        if scale.numel() not in (1, rows):
            raise ValueError(f"{name}: {scale.numel()} scales for {rows} output channels; there must be 1 or {rows}")
        return Scaled(values, scale.reshape(-1, 1).expand(rows, 1))

    def share(self, rows: tuple[int, int], columns: tuple[int, int]) -> Scaled:
        """[start, count) of the rows and of the columns."""
        values = self.values[rows[0] : rows[0] + rows[1], columns[0] : columns[0] + columns[1]]
        if self.block is None:
            return replace(self, values=values, scale=self.scale[rows[0] : rows[0] + rows[1]])
        return replace(self, values=values, first=(self.first[0] + rows[0], self.first[1] + columns[0]))

    def to(self, device: torch.device) -> Scaled:
        """On a device."""
        return replace(self, values=self.values.to(device), scale=self.scale.to(device))

    def plain(self) -> torch.Tensor:
        """The weight, [n, k] float32, without further rounding."""
        if self.block is None:
            return self.values.float() * self.scale
        row, column = (
            torch.arange(first, first + size, device=self.scale.device) // step
            for first, size, step in zip(self.first, self.values.shape, self.block, strict=True)
        )
        return self.values.float() * self.scale[row][:, column]
