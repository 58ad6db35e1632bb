"""Kernels on a GPU at full shapes: every head size and group, contexts of 1 to 32k in one batch."""

from __future__ import annotations

import pytest
import torch

from hw.cuda.fp8_linear import fp8_linear
from hw.cuda.product import Fp8, finish
from hw.cuda.sample import sample
from tests.hw.cuda import oracle
from tests.hw.cuda.test_kernels import BF16, BF16_ERROR, F8, F32, check_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("store", [BF16, F8])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_attention_contexts(device: torch.device, dim: int, store: torch.dtype) -> None:
    lens = [1, 15, 16, 17, 63, 64, 65, 127, 129, 1000, 4097, 32768, 513, 8192, 300]
    counts = [1] * 12 + [513, 130, 2]
    check_attention(device, lens, counts, 8, 2, dim, store, fp8=store is F8)


@pytest.mark.parametrize("store", [BF16, F8, F32])
@pytest.mark.parametrize("group", range(1, 9))
def test_attention_groups_at_full_size(device: torch.device, group: int, store: torch.dtype) -> None:
    check_attention(device, [700, 33, 640, 90], [1, 1, 200, 90], 4 * group, 4, 128, store)
    check_attention(device, [700, 3000] * 50, [1] * 100, 4 * group, 4, 128, store, window=500)


@pytest.mark.parametrize("tokens", [1, 3, 16, 32, 33, 64, 200])
@pytest.mark.parametrize(("num_out", "num_in"), [(6144, 4096), (4096, 4096), (4096, 14336), (28672, 4096)])
def test_fp8_linear_at_full_size(device: torch.device, tokens: int, num_out: int, num_in: int) -> None:
    x = Fp8(torch.randn(tokens, num_in, device=device).to(F8), torch.rand(tokens, device=device) + 0.5)
    weight, scale = torch.randn(num_out, num_in, device=device).to(F8), torch.rand(num_out, device=device) + 0.5
    result = finish(fp8_linear(x, weight, scale, None, BF16, torch.ones((), device=device)))
    expected = oracle.dequantised(x.values, x.scale) @ oracle.dequantised(weight, scale).T
    assert oracle.relative_error(result, expected) < BF16_ERROR


def test_sample_draws_as_the_reference_does(device: torch.device) -> None:
    from hw.cpu.sample import gumbel_noise

    rows, vocab = 200, 128256
    logits = torch.randn(rows, vocab, device=device) * 3
    keys = torch.randint(-(2**31), 2**31, (2, rows), dtype=torch.int32, device=device)
    heat = torch.rand(rows, device=device) + 0.1
    ids = sample(logits, heat, keys[0], keys[1])
    expected = (logits / heat[:, None] + gumbel_noise(keys[0], keys[1], vocab)).argmax(-1)
    assert int((ids != expected).sum()) <= 1
