"""fp8: e4m3 weights with a scale per output channel, e4m3 activations with a scale per token."""

from __future__ import annotations

from typing import Protocol

import torch

from core.errors import QuireError
from hw.ops import ActFormat, Activation, Ops
from hw.quant.scheme import Packed, Scheme

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0


class Fp8Ops(Ops, Protocol):
    """What a backend offers besides Ops when its capabilities name this scheme."""

    def fp8_linear(
        self, x: Activation, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> Activation:
        """x FP8_TOKEN [tokens, k], weight [n, k] e4m3, scale [n] float32 -> [tokens, n]."""
        ...


class Fp8:
    """See Scheme. Packed: e4m3 [n, k], scales [n] float32."""

    name = "fp8"
    input_format = ActFormat.FP8_TOKEN

    def check(self, num_out: int, num_in: int, name: str) -> None:
        """FP8 products take their operands in runs of 16 bytes."""
        if num_out % 16 or num_in % 16:
            text = f"{name}: a weight of {num_out} x {num_in} cannot be stored in fp8; both must be multiples of 16"
            raise QuireError("model_invalid", text, "quantization")

    def pack(self, weight: torch.Tensor) -> Packed:
        scale = (weight.abs().amax(1).float() / LARGEST).clamp_min(1e-12)
        return (weight / scale[:, None]).clamp_(-LARGEST, LARGEST).to(DTYPE), scale

    def adopt(self, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        return values, scale

    def apply(self, ops: Ops, x: Activation, packed: Packed, bias: torch.Tensor | None) -> Activation:
        fp8_ops: Fp8Ops = ops  # type: ignore[assignment]
        return fp8_ops.fp8_linear(x, packed[0], packed[1], bias)


def make() -> Scheme:
    """The scheme."""
    return Fp8()
