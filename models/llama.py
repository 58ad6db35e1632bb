"""Llama 2, 3, 3.1, 3.2 and what shares their architecture (Touvron et al. 2023; Grattafiori et al. 2024)."""

from __future__ import annotations

from typing import Any

from models.layers import decoder_config as decoder
from models.layers.decoder_config import DecoderConfig
from models.layers.model_config import ModelConfig
from models.layers.rope_settings import rope_settings

ARCHITECTURES = ("LlamaForCausalLM",)
WEIGHTS = (
    decoder.WEIGHTS
    | decoder.QKV_BIAS
    | {
        decoder.LAYER + "self_attn.o_proj.bias": ("layers.{i}.attention.out", ".bias"),
        decoder.LAYER + "mlp.gate_proj.bias": ("layers.{i}.mlp.gate_up", "gate.bias"),
        decoder.LAYER + "mlp.up_proj.bias": ("layers.{i}.mlp.gate_up", "up.bias"),
        decoder.LAYER + "mlp.down_proj.bias": ("layers.{i}.mlp.down", ".bias"),
    }
)


def config(values: dict[str, Any]) -> DecoderConfig:
    """config.json -> what the decoder needs."""
    read = ModelConfig(values)
    read.require("hidden_act", "silu")
    heads, layers = read.integer("num_attention_heads"), read.integer("num_hidden_layers")
    bias = read.flag("attention_bias")
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
        windows=(None,) * layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read.flag("mlp_bias"),
    )
