"""PlannedModel: a checkpoint as its config.json describes it. Share: what one rank has of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from core.errors import QuireError
from core.kv_layout import KVLayout
from core.model_info import read_config
from models.layers.decoder_config import DecoderConfig
from models.layers.weight_sizes import WeightSizes
from models.runtime import registry
from models.runtime.fp8_checkpoint import Fp8Checkpoint

ITEMSIZE = 2  # of bfloat16, in which a GPU keeps what no scheme packs
BLOCK_SIZE = 16  # of the CUDA backend


class KVStored(Enum):
    """Storage of the cache; see core.kv_layout.Stored."""

    bfloat16 = 2
    fp8 = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.value


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """`stores_fp8`: its weights are in FP8 already."""

    name: str
    config: DecoderConfig
    max_model_len: int
    stores_fp8: bool

    @staticmethod
    def read(model: str, revision: str | None = None) -> PlannedModel:
        """From a folder, hub id or built-in name. Raises QuireError model_invalid."""
        name, values, longest = read_config(model, revision)
        return PlannedModel.from_values(name, values, longest)

    @staticmethod
    def from_values(name: str, values: dict[str, Any], max_model_len: int) -> PlannedModel:
        """From config.json's content. Raises QuireError model_invalid."""
        try:
            config: DecoderConfig = registry.find(values).config(values)
        except ValueError as error:
            raise QuireError("model_invalid", str(error), "model") from None
        return PlannedModel(name, config, max_model_len, Fp8Checkpoint.read(values) is not None)


@dataclass(frozen=True, slots=True)
class Share:
    """What one of `ranks` equal ranks stores and computes. layout: its KV cache, without blocks."""

    ranks: int
    quantization: str
    weights: WeightSizes
    layout: KVLayout
    heads: int
    hidden: int

    @staticmethod
    def build(model: PlannedModel, ranks: int, quantization: str, kv: KVStored) -> Share:
        """Raises ValueError when the model cannot be shared, or its weights not packed."""
        config = model.config
        weights = WeightSizes.build(config, 0, ranks)
        if quantization == "fp8":
            for n, k in weights.linears:
                if n % 16 or k % 16:
                    raise ValueError(f"a weight of {n} x {k} cannot be stored in fp8; both must be multiples of 16")
        layout = KVLayout.build(config.kv_layers(0, ranks), BLOCK_SIZE, kv)
        return Share(ranks, quantization, weights, layout, config.num_heads // ranks, config.hidden_size)

    @property
    def num_bytes(self) -> int:
        """Of the weights."""
        return self.weights.num_bytes(self.quantization, ITEMSIZE)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of the cache, over all layers."""
        return sum(self.layout.bytes_per_token(group) for group in range(len(self.layout.groups)))
