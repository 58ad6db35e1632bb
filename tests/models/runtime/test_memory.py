"""models/runtime/memory.py."""

from __future__ import annotations

import pytest
import torch

from core.config import Config
from core.errors import QuireError
from hw.kvcache import KVLayout, LayerKV
from models.runtime.memory import plan_blocks

LAYOUT = KVLayout.build([LayerKV(2, 64)] * 8, 16, torch.float32)
BLOCK_BYTES = 16 * 8 * 2 * 2 * 64 * 4


def plan(config: Config, free_bytes: int = 8 << 30, on_cpu: bool = True, ranks: int = 1) -> int:
    return plan_blocks(config, LAYOUT, free_bytes, 2048, on_cpu=on_cpu, ranks=ranks)


def test_options_win() -> None:
    assert plan(Config(num_kv_blocks=7)) == 7
    assert plan(Config(kv_gib=0.5)) == (1 << 29) // BLOCK_BYTES


def test_default_is_a_share_and_never_more_than_the_sequences_fill() -> None:
    assert plan(Config()) == (2 << 30) // BLOCK_BYTES
    assert plan(Config(), 64 << 30) == (4 << 30) // BLOCK_BYTES
    assert plan(Config(), ranks=2) == (1 << 30) // BLOCK_BYTES
    assert plan(Config(max_num_seqs=2)) == 2 * 129 + 1
    assert plan(Config(gpu_memory_utilization=0.5), on_cpu=False) == (4 << 30) // BLOCK_BYTES


def test_too_little_is_said_in_one_sentence() -> None:
    with pytest.raises(QuireError, match="at least 2") as caught:
        plan(Config(kv_gib=1e-4))
    assert caught.value.param == "kv_gib"
