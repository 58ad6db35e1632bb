"""WeightSizes: parameters and bytes of one rank's weights, from a DecoderConfig alone. No torch, no weights.

The shapes are those that decoder.py builds; a test holds the sums against models that were built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from models.layers.decoder_config import DecoderConfig
from models.layers.sharing import share, share_kv_heads

# Scheme -> bytes of a packed [n, k] weight where plain elements take `item` bytes, as in hw/quant/<scheme>.py.
PACKED: dict[str, Callable[[int, int, int], int]] = {
    "none": lambda n, k, item: n * k * item,
    "fp8": lambda n, k, item: n * k + 4 * n,
    "int8": lambda n, k, item: n * k + item * n,
    "int4": lambda n, k, item: n * k // 2 + k // 32 * n * 2 * item,
}


@dataclass(frozen=True, slots=True)
class WeightSizes:
    """Parameters of one rank. linears: [n, k] of a layer's products; table_params: of one vocabulary table.

    plain_params: norms and biases, which no scheme packs, over all layers.
    """

    num_layers: int
    linears: tuple[tuple[int, int], ...]
    table_params: int
    num_tables: int
    plain_params: int

    @staticmethod
    def build(config: DecoderConfig, rank: int = 0, size: int = 1) -> WeightSizes:
        """The share of a rank of `size`. Raises ValueError when something cannot be shared equally."""
        hidden, dim = config.hidden_size, config.head_dim
        _, heads = share(config.num_heads, rank, size, "heads")
        _, kv_heads = share_kv_heads(config.num_kv_heads, rank, size, "attention")
        _, inner = share(config.intermediate_size, rank, size, "mlp")
        num_qkv = (heads + 2 * kv_heads) * dim
        biases = num_qkv * config.qkv_bias + hidden * config.out_bias + (2 * inner + hidden) * config.mlp_bias
        norms = 2 * hidden + 2 * dim * config.qk_norm
        return WeightSizes(
            config.num_layers,
            ((num_qkv, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)),
            -(-config.vocab_size // size) * hidden,
            1 if config.tied else 2,
            config.num_layers * (norms + biases) + hidden,
        )

    @property
    def linear_params(self) -> int:
        """Of all layers' products: what every token is multiplied by."""
        return self.num_layers * sum(n * k for n, k in self.linears)

    def linear_bytes(self, scheme: str, itemsize: int) -> int:
        """Of all layers' products, packed by `scheme`."""
        return self.num_layers * sum(PACKED[scheme](n, k, itemsize) for n, k in self.linears)

    def num_bytes(self, scheme: str, itemsize: int) -> int:
        """Of everything that the rank loads."""
        plain = self.table_params * self.num_tables + self.plain_params
        return self.linear_bytes(scheme, itemsize) + plain * itemsize
