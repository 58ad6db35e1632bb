"""int4: weights in 4 bits, in groups of 32 along the input with a scale each; multiplied by torch's CPU kernel."""

from __future__ import annotations

import torch

from core.errors import QuireError
from hw.backend import Capabilities
from hw.ops import ActFormat, Activation, Ops
from hw.quant.scheme import Packed, Scheme

GROUP = 32  # the kernel's smallest; divides what tensor parallelism leaves of every common shape
ROWS = 16  # the kernel packs this many output channels together


class Int4:
    """See Scheme. Packed: uint8 [n, k / 2] in the kernel's own order, scales and zeros [k / 32, n, 2]."""

    name = "int4"
    input_format = ActFormat.PLAIN

    def check(self, num_out: int, num_in: int, name: str) -> None:
        if num_in % GROUP or num_out % ROWS:
            text = f"{name}: a [{num_out}, {num_in}] weight cannot be int4; multiples of [{ROWS}, {GROUP}] can"
            raise QuireError("model_invalid", text, "quantization")

    def pack(self, weight: torch.Tensor) -> Packed:
        num_out, num_in = weight.shape
        groups = weight.float().view(num_out, num_in // GROUP, GROUP)
        # The value of largest magnitude becomes -8, the end of the range that has one step more.
        peak = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scale = torch.where(peak == 0, torch.ones_like(peak), peak / -8)
        codes = (groups / scale).round_().clamp_(-8, 7).add_(8).to(torch.int32).view(num_out, num_in)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        scales = scale[..., 0].t().to(weight.dtype)
        return packed, torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()

    def apply(self, ops: Ops, x: Activation, packed: Packed, bias: torch.Tensor | None) -> Activation:
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed[0], GROUP, packed[1])
        return result if bias is None else result.add_(bias)


def make(capabilities: Capabilities) -> Scheme:
    """The scheme, the same on every device."""
    return Int4()
