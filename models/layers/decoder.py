"""Decoder: the stack that the Llama family shares. A model file describes it by a DecoderConfig."""

from __future__ import annotations

import torch

from core.kv_layout import LayerKV
from hw.ops import ActFormat, LayerCache, StepInputs
from models.layers.attention import Attention
from models.layers.decoder_config import DecoderConfig
from models.layers.mlp import Mlp
from models.layers.norm import Norm
from models.layers.parts import Parts
from models.layers.rope import rope_table
from models.layers.vocab import Embedding, Head, VocabTable


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
