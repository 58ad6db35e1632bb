"""fp8: e4m3 weights with a scale per output channel, e4m3 activations with a scale per token.

Which e4m3 is the device's: e4m3fn, as checkpoints have it, or e4m3fnuz (fnuz.py).
"""

from __future__ import annotations

from typing import Protocol

import torch

from core.errors import QuireError
from hw.backend import Capabilities
from hw.ops import ActFormat, Activation, Ops
from hw.quant.fnuz import FNUZ, to_fnuz
from hw.quant.scheme import Packed, Scheme


class Fp8Ops(Ops, Protocol):
    """What a backend offers besides Ops when its capabilities name this scheme."""

    def fp8_linear(
        self, x: Activation, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> Activation:
        """x FP8_TOKEN [tokens, k], weight [n, k] e4m3, scale [n] float32 -> [tokens, n]."""
        ...


class Fp8:
    """See Scheme. Packed: e4m3 [n, k] of the device's format `dtype`, scales [n] float32."""

    name = "fp8"
    input_format = ActFormat.FP8_TOKEN

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max

    def check(self, num_out: int, num_in: int, name: str) -> None:
        """FP8 products take their operands in runs of 16 bytes."""
        if num_out % 16 or num_in % 16:
            text = f"{name}: a weight of {num_out} x {num_in} cannot be stored in fp8; both must be multiples of 16"
            raise QuireError("model_invalid", text, "quantization")

    def pack(self, weight: torch.Tensor) -> Packed:
        scale = (weight.abs().amax(1).float() / self._largest).clamp_min(1e-12)
        return (weight / scale[:, None]).clamp_(-self._largest, self._largest).to(self._dtype), scale

    def adopt(self, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        return to_fnuz(values, scale) if self._dtype is FNUZ else (values, scale)

    def apply(self, ops: Ops, x: Activation, packed: Packed, bias: torch.Tensor | None) -> Activation:
        fp8_ops: Fp8Ops = ops  # type: ignore[assignment]
        return fp8_ops.fp8_linear(x, packed[0], packed[1], bias)


def make(capabilities: Capabilities) -> Scheme:
    """The scheme, in the device's format."""
    assert capabilities.fp8 is not None, "a device with this scheme names its format"
    return Fp8(getattr(torch, capabilities.fp8))
