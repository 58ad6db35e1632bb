"""e4m3fn weights as e4m3fnuz: every one of the 256 values, quantisation while loading, and shards."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from hw.cpu.backend import CpuBackend
from hw.devices import E4M3FN, E4M3FNUZ
from hw.quant.fnuz import FN, FNUZ, to_fnuz
from hw.quant.scheme import AdoptsFp8, Packed, Scheme, make_scheme

PATTERNS = torch.arange(256, dtype=torch.uint8).view(FN).view(2, 128)


def fp8_scheme(name: str) -> Scheme:
    return make_scheme("fp8", replace(CpuBackend().capabilities, schemes=("none", "fp8"), fp8=name))


def dequantised(packed: Packed) -> torch.Tensor:
    return packed[0].float() * packed[1][:, None]


def test_every_value_is_kept() -> None:
    scale = torch.tensor([0.37, 1.5])
    values, doubled = to_fnuz(PATTERNS, scale)
    assert (values.dtype, doubled.dtype) == (FNUZ, torch.float32)
    want = PATTERNS.float() * scale[:, None]
    torch.testing.assert_close(dequantised((values, doubled)), want, atol=0, rtol=0, equal_nan=True)
    assert int(values.float().isnan().sum()) == 2, "only NaN is NaN"
    assert float(values.float().nan_to_num(0).abs().max()) == 224


def test_the_bits_alone_would_be_wrong() -> None:
    """What the two patterns are for: without them -0 is NaN, and NaN is a number."""
    raw = PATTERNS.view(torch.uint8).view(FNUZ).float()
    assert bool(raw.view(-1)[0x80].isnan())
    assert raw.view(-1)[0x7F] == 240
    values, _ = to_fnuz(PATTERNS, torch.ones(2))
    assert values.float().view(-1)[0x80] == 0
    assert bool(values.float().view(-1)[0x7F].isnan())


def test_the_source_is_left_alone() -> None:
    before = PATTERNS.view(torch.uint8).clone()
    to_fnuz(PATTERNS, torch.ones(2))
    assert torch.equal(PATTERNS.view(torch.uint8), before)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float8_e5m2, not torch\.float8_e4m3fn"):
        to_fnuz(torch.zeros(2, 2, dtype=torch.float8_e5m2), torch.ones(2))


def test_a_device_adopts_a_checkpoints_weights_in_its_own_format() -> None:
    weight = torch.randn(48, 64) * torch.rand(48, 1) * 5
    scale = weight.abs().amax(1) / 448
    values = (weight / scale[:, None]).to(FN)
    for name, dtype in ((E4M3FN, FN), (E4M3FNUZ, FNUZ)):
        scheme = fp8_scheme(name)
        assert isinstance(scheme, AdoptsFp8)
        packed = scheme.adopt(values, scale)
        assert packed[0].dtype == dtype
        torch.testing.assert_close(dequantised(packed), values.float() * scale[:, None], atol=0, rtol=0)


@pytest.mark.parametrize("name", [E4M3FN, E4M3FNUZ])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_rounds_to_the_nearest_and_clips_nothing(name: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 256) * 10 ** random.uniform(-3, 3)).to(dtype)
    weight[5] = 0
    weight[6, :2] = torch.tensor([1e-30, -1e-30])  # far below its row's smallest step: must not become NaN
    values, scale = fp8_scheme(name).pack(weight)
    assert values.dtype == getattr(torch, name)
    assert not bool(values.float().isnan().any())
    error = (dequantised((values, scale)) - weight.float()).abs()
    # Half of a step of 3 bits, a little more for bfloat16's quotient; below the normal range steps are all equal.
    largest = weight.float().abs().amax(1, keepdim=True)
    bound = weight.float().abs() * (0.0626 if dtype == torch.float32 else 0.071) + largest * 2**-16
    assert bool((error <= bound).all())
    rows = largest.view(-1) > 0
    torch.testing.assert_close(
        dequantised((values, scale)).abs().amax(1)[rows], largest.view(-1)[rows], rtol=4e-3, atol=0
    )


def test_shards_are_parts_of_the_whole() -> None:
    values, scale = torch.randn(32, 64).to(FN), torch.rand(32)
    whole = to_fnuz(values, scale)
    for rows in (slice(0, 16), slice(16, 32)):
        part = to_fnuz(values[rows, 16:48].contiguous(), scale[rows])
        assert torch.equal(part[0].view(torch.uint8), whole[0][rows, 16:48].view(torch.uint8))
        assert torch.equal(part[1], whole[1][rows])
