"""Limit: the least time that a step can take on a GPU, from bytes and operations alone.

A closed loop keeps `concurrency` sequences running. In the steady state a step then carries one token of each, and
prompt tokens in the same proportion as the load has: concurrency * prompt / output of them. Each kind of work takes
the longer of its bytes and its operations, and one kind comes after the other: a stream of kernels does not overlap
them. What a step cannot do without:

    products    max(weights / memory, 2 * parameters * tokens / product rate), all tokens in one pass
    head        the same for the output layer, which only tokens that are sampled from need
    kv          the cache that decoding reads, at the mean context of prompt + output / 2
    attention   the prompts' own attention
    link        sums over the ranks: two per layer and one for the embedding, and the logits
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.plan.gpus import Rates
from tools.plan.model import ITEMSIZE, Share


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: so many requests at once, each with a prompt and an answer of so many tokens."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int

    @property
    def context(self) -> float:
        """Mean positions that a decoding token sees."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def total_tokens(self) -> int:
        """Of one request."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds of one step, by kind of work; see the module. The prompts' share of the products is in `products`.

    decode: products and head of a step that only decodes. prompt: one prompt alone.
    products_by_compute: operations, not bytes, bound the products.
    """

    products: float
    head: float
    kv: float
    attention: float
    link: float
    decode: float
    prompt: float
    products_by_compute: bool

    @property
    def step(self) -> float:
        """All of it."""
        return self.products + self.head + self.kv + self.attention + self.link

    @property
    def bound(self) -> str:
        """What takes longest."""
        products = "arithmetic of the products" if self.products_by_compute else "reading the weights"
        parts = {
            products: self.products,
            "the output layer": self.head,
            "reading the KV cache": self.kv,
            "attention of the prompts": self.attention,
            "the link between the GPUs": self.link,
        }
        return max(parts, key=parts.__getitem__)


def limit_of(share: Share, rates: Rates, load: Load) -> Limit:
    """The limit of one rank; the others do the same at the same time."""
    weights, rows, size = share.weights, load.concurrency, load.prompt_tokens
    rate = rates.fp8_products if share.quantization == "fp8" else rates.plain_products
    read = weights.linear_bytes(share.quantization, ITEMSIZE) / rates.memory

    def products(tokens: float) -> float:
        return max(read, 2 * weights.linear_params * tokens / rate)

    prompts = rows * size / load.output_tokens  # prompt tokens of a step
    tokens = rows + prompts
    table = weights.table_params
    head = max(table * ITEMSIZE / rates.memory, 2 * table * rows / rates.plain_products)
    own_attention = _attention_operations(share, size) / rates.attention
    return Limit(
        products=products(tokens),
        head=head,
        kv=rows * _read_per_token(share, load.context) / rates.memory,
        attention=own_attention * rows / load.output_tokens,
        link=_link_bytes(share, tokens, rows) / rates.link,
        decode=products(rows) + head,
        prompt=products(size) + own_attention + _link_bytes(share, size, 1) / rates.link,
        products_by_compute=products(tokens) > read,
    )


def _read_per_token(share: Share, context: float) -> float:
    """Bytes of the cache that one decoding token reads."""
    groups = share.layout.groups
    seen = [context if group.kv.window is None else min(context, group.kv.window) for group in groups]
    return sum(share.layout.bytes_per_token(index) * seen[index] for index in range(len(groups)))


def _attention_operations(share: Share, size: int) -> float:
    """Of a prompt's own attention: two products of head_dim per pair of query and key, the causal half of them."""
    total = 0.0
    for group in share.layout.groups:
        window = min(size, group.kv.window or size)
        pairs = window * window / 2 + (size - window) * window
        total += 4 * share.heads * group.kv.head_dim * pairs * len(group.layers)
    return total


def _link_bytes(share: Share, tokens: float, sampled: float) -> float:
    """Bytes that a rank sends in a ring; none when it is alone."""
    if share.ranks == 1:
        return 0.0
    passed = (share.ranks - 1) / share.ranks
    sums = 2 * passed * tokens * share.hidden * ITEMSIZE * (2 * share.weights.num_layers + 1)
    logits = passed * sampled * share.ranks * share.weights.table_params / share.hidden * ITEMSIZE
    return sums + logits
