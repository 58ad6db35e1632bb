"""Decoder: the stack that the Llama family shares. A model file describes it by a DecoderConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hw.kvcache import LayerKV
from hw.ops import ActFormat, LayerCache, StepInputs
from models.layers.attention import Attention
from models.layers.mlp import Mlp
from models.layers.norm import Norm
from models.layers.parts import Parts
from models.layers.rope import rope_table
from models.layers.vocab import Embedding, Head, VocabTable


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


class DecoderLayer:
    """Attention and MLP with the norm before each."""

    def __init__(self, parts: Parts, name: str, config: DecoderConfig, window: int | None, rope: torch.Tensor) -> None:
        self.attention_norm = Norm(parts, f"{name}.attention_norm", config.hidden_size, config.eps)
        self.attention = Attention(
            parts,
            f"{name}.attention",
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            rope,
            window=window,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=config.eps if config.qk_norm else None,
        )
        self.mlp_norm = Norm(parts, f"{name}.mlp_norm", config.hidden_size, config.eps)
        self.mlp = Mlp(parts, f"{name}.mlp", config.hidden_size, config.intermediate_size, config.mlp_bias)


class Decoder:
    """Token ids in, hidden states and logits out.

    Args:
        num_positions: longest sequence served; the rotation table's length.
    """

    def __init__(self, config: DecoderConfig, parts: Parts, num_positions: int) -> None:
        self._ops = parts.backend.ops
        self.parts = parts
        rope = rope_table(config.rope, config.head_dim, num_positions).to(parts.device)
        embedding = VocabTable(parts, "embedding", config.vocab_size, config.hidden_size)
        self.embedding = Embedding(parts, embedding)
        self.layers = [
            DecoderLayer(parts, f"layers.{index}", config, window, rope) for index, window in enumerate(config.windows)
        ]
        self.norm = Norm(parts, "norm", config.hidden_size, config.eps)
        output = embedding if config.tied else VocabTable(parts, "head", config.vocab_size, config.hidden_size)
        self.head = Head(parts, output)

    @property
    def kv_layers(self) -> list[LayerKV]:
        """What each layer stores per token on this rank."""
        return [layer.attention.kv for layer in self.layers]

    def forward(self, ids: torch.Tensor, inputs: StepInputs, caches: list[LayerCache]) -> torch.Tensor:
        """ids [tokens] -> hidden states [tokens, hidden] after the last norm; writes the caches."""
        ops = self._ops
        residual = self.embedding(ids)
        first = self.layers[0]
        x = ops.rms_norm(residual, first.attention_norm.weight, first.attention_norm.eps, _format(first))
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x = layer.attention(x, inputs, cache)
            norm = layer.mlp_norm
            x, residual = ops.add_rms_norm(x, residual, norm.weight, norm.eps, layer.mlp.gate_up.input_format)
            x = layer.mlp(x)
            last = index + 1 == len(self.layers)
            norm = self.norm if last else self.layers[index + 1].attention_norm
            out = ActFormat.PLAIN if last else _format(self.layers[index + 1])
            x, residual = ops.add_rms_norm(x, residual, norm.weight, norm.eps, out)
        return x  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [m, hidden] -> logits [m, vocab] float32, whole on every rank."""
        return self.head(hidden)


def _format(layer: DecoderLayer) -> ActFormat:
    return layer.attention.qkv.input_format


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
