"""No quantization: the weight as it is."""

from __future__ import annotations

import torch

from hw.backend import Capabilities
from hw.ops import ActFormat, Activation, Ops
from hw.quant.scheme import Packed, Scheme


class Plain:
    """See Scheme."""

    name = "none"
    input_format = ActFormat.PLAIN

    def check(self, num_out: int, num_in: int, name: str) -> None:
        """Every shape will do."""

    def pack(self, weight: torch.Tensor) -> Packed:
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            # Inputs innermost cost MKL a quarter more time at 16 rows: the same [n, k], the other way round in memory.
            return (weight.t().contiguous().t(),)
        return (weight,)

    def apply(self, ops: Ops, x: Activation, packed: Packed, bias: torch.Tensor | None) -> Activation:
        return ops.linear(x, packed[0], bias)


def make(capabilities: Capabilities) -> Scheme:
    """The scheme, the same on every device."""
    return Plain()
