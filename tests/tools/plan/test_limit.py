"""The limit of a load, against figures worked out by hand and with another program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tools.plan.gpus import Catalogue, Rates
from tools.plan.limit import Load, limit_of
from tools.plan.model import KVStored, PlannedModel, Share

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SMALL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
RATES = Rates(memory=1e6, plain_products=1e9, fp8_products=2e9, attention=1e8, link=1e5)


def share(values: dict[str, Any], quantization: str = "none", kv: str = "bfloat16", ranks: int = 1) -> Share:
    return Share.build(PlannedModel.from_values("m", values, 4096), ranks, quantization, KVStored[kv])


@pytest.mark.parametrize(
    ("values", "quantization", "kv", "concurrency", "tokens_per_s"),
    [
        (LLAMA_8B, "fp8", "fp8", 1, 533),
        (LLAMA_8B, "fp8", "fp8", 8, 4104),
        (LLAMA_8B, "fp8", "fp8", 64, 22179),
        (LLAMA_8B, "fp8", "fp8", 256, 23393),
        (LLAMA_8B, "none", "bfloat16", 16, 4199),
        (LLAMA_8B, "none", "bfloat16", 256, 12441),
        (LLAMA_70B, "fp8", "fp8", 64, 2952),
    ],
)
def test_llama_on_an_h200(
    values: dict[str, Any], quantization: str, kv: str, concurrency: int, tokens_per_s: float
) -> None:
    catalogue = Catalogue.read()
    limit = limit_of(
        share(values, quantization, kv), catalogue.rates(catalogue.find("h200")), Load(concurrency, 512, 256)
    )
    assert concurrency / limit.step == pytest.approx(tokens_per_s, rel=0.002)


def test_each_kind_of_work_by_hand() -> None:
    limit = limit_of(share(SMALL), RATES, Load(4, 10, 20))
    # Per layer: q, k, v (4 + 2 + 2) * 16 x 64, out 64 x 64, gate and up 256 x 64, down 64 x 128.
    weights = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
    assert limit.products == pytest.approx(max(weights * 2 / 1e6, 2 * weights * (4 + 2) / 1e9))
    assert limit.head == pytest.approx(max(100 * 64 * 2 / 1e6, 2 * 100 * 64 * 4 / 1e9))
    assert limit.kv == pytest.approx(4 * 20 * (2 * 2 * 2 * 16 * 2) / 1e6)
    prompt = 4 * 4 * 16 * (10 * 10 / 2) * 2
    assert limit.attention == pytest.approx(prompt / 1e8 * 4 / 20)
    assert limit.link == 0
    assert limit.step == pytest.approx(limit.products + limit.head + limit.kv + limit.attention)


def test_a_window_bounds_what_is_read_and_what_prompts_attend_to() -> None:
    load = Load(4, 100, 20)
    full, sliding = share(SMALL), share(SMALL | {"sliding_window": 16})
    assert limit_of(sliding, RATES, load).kv == pytest.approx(limit_of(full, RATES, load).kv * 16 / 110)
    pairs = 16 * 16 / 2 + 84 * 16
    shrunk = limit_of(full, RATES, load).attention * pairs / (100 * 100 / 2)
    assert limit_of(sliding, RATES, load).attention == pytest.approx(shrunk)
    same = Load(4, 10, 4)
    assert limit_of(sliding, RATES, same) == limit_of(full, RATES, same)


def test_ranks_share_the_work_and_pay_for_the_link() -> None:
    load = Load(4, 10, 20)
    alone, two = limit_of(share(SMALL), RATES, load), limit_of(share(SMALL, ranks=2), RATES, load)
    for kind in ("products", "head", "kv", "attention"):
        assert getattr(two, kind) == pytest.approx(getattr(alone, kind) / 2)
    # In a ring of two each rank sends its half twice: 5 sums of 6 tokens, and the logits of 4.
    assert two.link == pytest.approx((5 * 6 * 64 * 2 + 4 * 100 * 2 / 2) / 1e5)


def test_what_takes_longest_is_named() -> None:
    small = share(SMALL)
    assert limit_of(small, RATES, Load(1, 1, 1)).bound == "reading the weights"
    assert limit_of(small, RATES, Load(1000, 1, 1000)).bound == "reading the KV cache"
    assert limit_of(small, replace(RATES, attention=1.0), Load(1, 100, 1)).bound == "attention of the prompts"
    slow = replace(RATES, plain_products=1e6)
    assert limit_of(small, slow, Load(8, 1, 8)).bound == "arithmetic of the products"
