"""Shards of every architecture against one rank, in threads: heads, repeated K/V heads, biases, odd vocabularies."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import QuireError
from hw.comm import Comm
from tests.models.running import load, logits_of

Checkpoint = Callable[..., tuple[Path, Any]]


class Exchange:
    """Where the threads of one group lay down their tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size

    def all(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor. All must have the same shape."""
        self.tensors[rank] = x.clone()
        self.barrier.wait()
        result = list(self.tensors)
        self.barrier.wait()
        return result


class ThreadComm(Comm):
    """A Comm whose ranks are threads."""

    def __init__(self, rank: int, exchange: Exchange) -> None:
        super().__init__(rank, exchange.size)
        self._exchange = exchange

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange.all(self.rank, x)).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange.all(self.rank, x), dim=-1)


def sharded(folder: Path, size: int, ids: list[list[int]], quantization: str = "none") -> list[list[torch.Tensor]]:
    """Per rank, the logits of every sequence. inference_mode is a thread's own: logits_of enters it."""
    exchange = Exchange(size)

    def one(rank: int) -> list[torch.Tensor]:
        try:
            model = load(folder, quantization=quantization, comm=ThreadComm(rank, exchange))
            return logits_of(model, ids, [9, 1, 4])
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama": ("llama", 2, {}),
    "llama biases, tied": ("llama", 2, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama repeated kv heads": ("llama", 4, {}),
    "llama one kv head": ("llama", 2, {"num_key_value_heads": 1}),
    "mistral": ("mistral", 2, {"sliding_window": 11}),
    "qwen2 mixed windows": ("qwen2", 2, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", 4, {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_shards_give_the_logits_of_one_rank(checkpoint: Checkpoint, case: str) -> None:
    kind, size, changes = CASES[case]
    folder, _ = checkpoint(kind, random.randrange(1000), **changes)
    sequences = [[random.randrange(131) for _ in range(length)] for length in (30, 1, 17)]
    whole = logits_of(load(folder), sequences, [9, 1, 4])
    ranks = sharded(folder, size, sequences)
    for rank in ranks:
        for got, want, first in zip(rank, whole, ranks[0], strict=True):
            assert torch.equal(got, first), "ranks must draw the same token"
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, atol=1e-4 * max(1.0, float(want.abs().max())), rtol=0)


def test_int4_shards_give_the_logits_of_one_rank(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("llama", 7, intermediate_size=128)
    sequences = [[random.randrange(131) for _ in range(21)]]
    (want,) = logits_of(load(folder, quantization="int4"), sequences, [21])
    for (got,) in sharded(folder, 2, sequences, "int4"):
        torch.testing.assert_close(got, want, atol=1e-4 * max(1.0, float(want.abs().max())), rtol=0)


def test_int8_shards_are_as_close_as_one_rank(checkpoint: Checkpoint) -> None:
    """A row-parallel shard has scales of its own, which are finer: equal in quality, not in bits."""
    folder, _ = checkpoint("llama", 8)
    sequences = [[random.randrange(131) for _ in range(21)]]
    (plain,) = logits_of(load(folder), sequences, [21])
    (whole,) = logits_of(load(folder, quantization="int8"), sequences, [21])
    for (got,) in sharded(folder, 2, sequences, "int8"):
        error = float((got - plain).norm())
        assert 0 < error < 1.5 * float((whole - plain).norm())


@pytest.mark.parametrize(
    ("size", "changes", "words"),
    [
        (3, {}, ["4 cannot be divided among 3 ranks", "--tensor-parallel-size"]),
        (2, {"intermediate_size": 97}, ["97 cannot be divided among 2 ranks"]),
        (
            6,
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4},
            ["4 K/V heads cannot be repeated on 6 ranks"],
        ),
    ],
)
def test_what_cannot_be_shared_is_said(
    checkpoint: Checkpoint, size: int, changes: dict[str, Any], words: list[str]
) -> None:
    folder, _ = checkpoint("llama", 0, **changes)
    with pytest.raises(QuireError) as caught:
        load(folder, comm=Comm(0, size))
    assert caught.value.code == "model_invalid"
    for word in words:
        assert word in caught.value.message
