"""Sizes worked out from config.json alone equal those of models that were built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.model_info import read_json
from hw.comm import Comm
from hw.cpu.backend import CpuBackend
from hw.quant.scheme import SCHEMES, make_scheme
from models.layers.weight_sizes import PACKED, WeightSizes
from models.runtime import registry
from models.runtime.loader import load_model, num_bytes

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "vocab_size": 130}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {}),
    ("qwen3", {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_bytes_and_cache_are_those_of_the_model(
    checkpoint: Any, kind: str, changes: dict[str, Any], scheme: str, rank: int, size: int
) -> None:
    folder: Path
    folder, _ = checkpoint(kind, **changes, intermediate_size=128)
    values = read_json(folder / "config.json")
    config = registry.find(values).config(values)
    built = load_model(
        folder,
        CpuBackend(),
        Comm(rank, size),
        dtype=torch.bfloat16,
        quantization=scheme,
        load_format="dummy",
        num_positions=32,
    )
    assert WeightSizes.build(config, rank, size).num_bytes(scheme, 2) == num_bytes(built)
    assert config.kv_layers(rank, size) == built.kv_layers


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_its_size(name: str) -> None:
    weight = torch.randn(48, 64, dtype=torch.bfloat16)
    packed = make_scheme(name, replace(CpuBackend().capabilities, schemes=tuple(SCHEMES))).pack(weight)
    assert PACKED[name](48, 64, 2) == sum(tensor.numel() * tensor.itemsize for tensor in packed)


def test_what_cannot_be_shared_is_said(checkpoint: Any) -> None:
    values = read_json(checkpoint("llama")[0] / "config.json")
    with pytest.raises(ValueError, match="heads: 4 cannot be divided among 3 ranks"):
        WeightSizes.build(registry.find(values).config(values), 0, 3)
