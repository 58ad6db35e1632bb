"""fnuz: e4m3fn values as e4m3fnuz, the format that AMD's gfx942 multiplies. Exact: nothing is rounded or clipped."""

from __future__ import annotations

import torch

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
SCALE_RATIO = 2.0  # the exponent's bias is larger by one, so the same bits mean half: 448 becomes 224, of 240 at most


def to_fnuz(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """values e4m3fn, scale float32 -> (e4m3fnuz, scale) whose product is the same.

    The bits are kept, but for two patterns that mean something else: -0 would be NaN and becomes 0; NaN would be 240
    and stays NaN.
    """
    if values.dtype != FN:
        raise ValueError(f"values are {values.dtype}, not {FN}")
    bits = values.view(torch.uint8)
    plain = torch.where(bits == 0x80, 0, bits)
    return torch.where(plain & 0x7F == 0x7F, 0x80, plain).to(torch.uint8).view(FNUZ), scale * SCALE_RATIO
