"""DecoderConfig: what the Llama family's members differ in, and how checkpoints spell their weights. No torch: `quire
plan` reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.kv_layout import LayerKV
from models.layers.sharing import share_kv_heads


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """What differs between the members of the family. `windows`: per layer, None for full attention."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    tied: bool
    rope: dict[str, Any]
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def kv_layers(self, rank: int, size: int) -> list[LayerKV]:
        """What each layer stores per token on a rank of `size`. Raises ValueError when heads cannot be shared."""
        _, kv_heads = share_kv_heads(self.num_kv_heads, rank, size, "attention")
        return [LayerKV(kv_heads, self.head_dim, window) for window in self.windows]


LAYER = "model.layers.{i}."
WEIGHTS = {
    "model.embed_tokens.weight": ("embedding", ""),
    "model.norm.weight": ("norm", ""),
    "lm_head.weight": ("head", ""),
    LAYER + "input_layernorm.weight": ("layers.{i}.attention_norm", ""),
    LAYER + "post_attention_layernorm.weight": ("layers.{i}.mlp_norm", ""),
    LAYER + "self_attn.q_proj.weight": ("layers.{i}.attention.qkv", "q.weight"),
    LAYER + "self_attn.k_proj.weight": ("layers.{i}.attention.qkv", "k.weight"),
    LAYER + "self_attn.v_proj.weight": ("layers.{i}.attention.qkv", "v.weight"),
    LAYER + "self_attn.o_proj.weight": ("layers.{i}.attention.out", ".weight"),
    LAYER + "mlp.gate_proj.weight": ("layers.{i}.mlp.gate_up", "gate.weight"),
    LAYER + "mlp.up_proj.weight": ("layers.{i}.mlp.gate_up", "up.weight"),
    LAYER + "mlp.down_proj.weight": ("layers.{i}.mlp.down", ".weight"),
}
"""Checkpoint name -> (weight, slot), as the whole family spells it; model files add what is their own."""

QKV_BIAS = {
    LAYER + f"self_attn.{name}_proj.bias": ("layers.{i}.attention.qkv", f"{name}.bias") for name in ("q", "k", "v")
}
