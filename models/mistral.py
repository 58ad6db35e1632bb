"""Mistral 7B and what shares its architecture: Llama with a sliding window in every layer (Jiang et al. 2023)."""

from __future__ import annotations

from typing import Any

from models.layers import decoder_config as decoder
from models.layers.decoder_config import DecoderConfig
from models.layers.model_config import ModelConfig
from models.layers.rope_settings import rope_settings

ARCHITECTURES = ("MistralForCausalLM",)
WEIGHTS = decoder.WEIGHTS


def config(values: dict[str, Any]) -> DecoderConfig:
    """config.json -> what the decoder needs. sliding_window null (from v0.2 on): full attention; no such key: 4096."""
    read = ModelConfig(values)
    read.require("hidden_act", "silu")
    heads, layers = read.integer("num_attention_heads"), read.integer("num_hidden_layers")
    window = read.integer("sliding_window", 4096) if values.get("sliding_window", 4096) is not None else None
    return DecoderConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", 8),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
        eps=read.number("rms_norm_eps", 1e-6),
        tied=read.flag("tie_word_embeddings"),
        rope=rope_settings(values),
        windows=(window,) * layers,
    )
