"""Mlp: the gated feed-forward block, silu(x Wg) * (x Wu) Wd (Shazeer 2020)."""

from __future__ import annotations

from hw.ops import Activation
from models.layers.linear import column_parallel, row_parallel
from models.layers.parts import Parts


class Mlp:
    """gate and up are one product; the intermediate size is shared among the ranks."""

    def __init__(self, parts: Parts, name: str, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        self._parts = parts
        outputs = {"gate": intermediate_size, "up": intermediate_size}
        self.gate_up = column_parallel(parts, f"{name}.gate_up", outputs, hidden_size, bias=bias)
        self.down = row_parallel(parts, f"{name}.down", hidden_size, intermediate_size, bias=bias)

    def __call__(self, x: Activation) -> Activation:
        return self.down(self._parts.backend.ops.silu_mul(self.gate_up(x), self.down.input_format))
