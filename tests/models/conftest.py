"""Model tests: one torch thread, and checkpoints made on the spot by transformers, with nothing downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from core.model_info import BUILTIN

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """checkpoint(kind, seed, **config changes) -> (folder, transformers' float32 model) with random weights."""

    def make(kind: str, seed: int = 0, *, max_shard_size: str = "5GB", **changes: Any) -> tuple[Path, Any]:
        config_class, model_class = CONFIGS[kind]
        torch.manual_seed(seed)
        model = model_class(config_class(**{**SMALL, "head_dim": 16, **changes})).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Larger than the usual initialisation, so that attention is far from uniform and errors show.
                weight.normal_(0, 0.2) if "norm" not in name else weight.uniform_(0.5, 1.5)
        folder = tmp_path / f"{kind}-{seed}"
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        shutil.copy(BUILTIN["tiny-chat"] / "tokenizer.json", folder)
        return folder, model

    return make
