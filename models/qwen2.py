"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, optionally a window in upper layers (Yang et al. 2024)."""

from __future__ import annotations

from typing import Any

from models.layers import decoder_config as decoder
from models.layers.decoder_config import DecoderConfig
from models.layers.model_config import ModelConfig
from models.layers.rope_settings import rope_settings

ARCHITECTURES = ("Qwen2ForCausalLM",)
WEIGHTS = decoder.WEIGHTS | decoder.QKV_BIAS


def config(values: dict[str, Any]) -> DecoderConfig:
    """config.json -> what the decoder needs."""
    read = ModelConfig(values)
    read.require("hidden_act", "silu")
    heads, layers = read.integer("num_attention_heads"), read.integer("num_hidden_layers")
    return DecoderConfig(
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", heads),
        head_dim=read.integer("head_dim", read.integer("hidden_size") // heads),
        eps=read.number("rms_norm_eps", 1e-6),
        tied=read.flag("tie_word_embeddings"),
        rope=rope_settings(values),
        windows=windows(values, layers),
        qkv_bias=True,
    )


def windows(values: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Per layer. layer_types says it outright; older files mean: layers from max_window_layers on slide."""
    read = ModelConfig(values)
    if not read.flag("use_sliding_window") or values.get("sliding_window") is None:
        return (None,) * num_layers
    window = read.integer("sliding_window")
    kinds = values.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise ValueError(f"config.json: layer_types must name one of {', '.join(known)} per layer, is {kinds!r}")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = int(read.number("max_window_layers", 28))
    return tuple(window if index >= first else None for index in range(num_layers))
