"""Weight schemes: close to the plain weight, exact against what they store, and equal however they are sharded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.errors import QuireError
from hw.cpu.backend import CpuBackend
from hw.cpu.ops import CpuOps
from hw.quant.int4 import GROUP
from hw.quant.scheme import make_scheme

ALL = ("none", "int8", "int4")
DEVICE = CpuBackend().capabilities


def stored(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight [n, k] as the scheme sees it: its product with the identity."""
    scheme = make_scheme(name, DEVICE)
    eye = torch.eye(weight.shape[1], dtype=weight.dtype)
    result: torch.Tensor = scheme.apply(CpuOps(), eye, scheme.pack(weight), None)
    return result.t()


def steps(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The distance between neighbouring values that the scheme can store, per weight."""
    if name == "int8":
        return weight.abs().amax(1, keepdim=True) / 127
    groups = weight.view(weight.shape[0], -1, GROUP)
    return (groups.abs().amax(2, keepdim=True) / 8).expand_as(groups).reshape(weight.shape)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_rounds_to_the_nearest(name: str) -> None:
    weight = torch.randn(48, 128) * torch.rand(48, 1) * 3
    weight[3] = 0
    error = (stored(name, weight) - weight).abs()
    # int4 has one step less on the side opposite to the largest value: there the error may be a whole step.
    bound = steps(name, weight) * (0.501 if name == "int8" else 1.001) + 1e-6
    assert bool((error <= bound).all())
    assert float((error / bound).max()) > 0.5, "nothing was rounded"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiplies_what_it_stores(name: str, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(64, 96).to(dtype), torch.randn(64).to(dtype)
    scheme = make_scheme(name, DEVICE)
    packed = scheme.pack(weight)
    for rows in (1, 5, 33):
        x = torch.randn(rows, 96).to(dtype)
        want = x.float() @ stored(name, weight).float().t() + bias.float()
        got = scheme.apply(CpuOps(), x, packed, bias)
        assert got.dtype == dtype
        tolerance = 1e-4 if dtype == torch.float32 else 0.15
        torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance / 10)


@pytest.mark.parametrize("name", ["int4", "none"])
def test_shards_of_columns_are_equal(name: str) -> None:
    weight = torch.randn(32, 128)
    halves = torch.cat([stored(name, weight[:, :64].contiguous()), stored(name, weight[:, 64:].contiguous())], 1)
    torch.testing.assert_close(halves, stored(name, weight), atol=0, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_shards_of_rows_are_equal(name: str) -> None:
    weight = torch.randn(64, 96)
    halves = torch.cat([stored(name, weight[:32].contiguous()), stored(name, weight[32:].contiguous())])
    torch.testing.assert_close(halves, stored(name, weight), atol=1e-6, rtol=1e-6)


def test_bytes() -> None:
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    sizes = {n: sum(t.numel() * t.itemsize for t in make_scheme(n, DEVICE).pack(weight)) for n in ALL}
    assert sizes["int8"] < 0.52 * sizes["none"]
    assert sizes["int4"] < 0.38 * sizes["none"]


def test_refusals_name_the_fix() -> None:
    plain = replace(DEVICE, device_name="Abacus", schemes=("none",))
    with pytest.raises(QuireError, match="--quantization: 'int4' is not available on Abacus; choose none") as caught:
        make_scheme("int4", plain)
    assert (caught.value.code, caught.value.param) == ("invalid_config", "quantization")
    with pytest.raises(QuireError, match=r"\[64, 40\] weight cannot be int4"):
        make_scheme("int4", DEVICE).check(64, 40, "layer")
