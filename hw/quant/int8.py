"""int8: weights in 8 bits with a scale per output channel, activations plain; multiplied by torch's CPU kernel."""

from __future__ import annotations

import torch

from hw.backend import Capabilities
from hw.ops import ActFormat, Activation, Ops
from hw.quant.scheme import Packed, Scheme


class Int8:
    """See Scheme. Packed: int8 [n, k], scales [n] in the model's dtype. Half of bf16's bytes."""

    name = "int8"
    input_format = ActFormat.PLAIN

    def check(self, num_out: int, num_in: int, name: str) -> None:
        """Every shape will do."""

    def pack(self, weight: torch.Tensor) -> Packed:
        plain = weight.float()
        scale = (plain.abs().amax(1) / 127).clamp_min(1e-12)
        values = (plain / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return values, scale.to(weight.dtype)

    def apply(self, ops: Ops, x: Activation, packed: Packed, bias: torch.Tensor | None) -> Activation:
        result = torch._weight_int8pack_mm(x.contiguous(), packed[0], packed[1])
        return result if bias is None else result.add_(bias)


def make(capabilities: Capabilities) -> Scheme:
    """The scheme, the same on every device."""
    return Int8()
