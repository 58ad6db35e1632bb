"""The list of operations that a backend gives to the models: names, shapes, contracts.

Layers call these and nothing else, so a model file knows neither hardware nor precision. hw/cpu is the plain-torch
implementation and the oracle of every other one. All tensors live on the backend's device; nothing here may
synchronise with the host, so that a whole step can be captured in a graph. `tokens` is the padded token count of the
step; rows beyond `StepInputs.num_tokens` hold garbage that no op may let reach a real row or the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

Activation = Any
"""What one op hands to the next: a tensor, or a backend's own form (FP8 values with scales, split-K partials).

Layers pass it on and never look inside. Only the op that is named in a docstring may consume each form.
"""


class ActFormat(Enum):
    """In which form the consumer (a Linear's scheme) wants its input; producers fuse the conversion."""

    PLAIN = "plain"  # the model's dtype
    FP8_TOKEN = "fp8_token"  # e4m3 values [tokens, n] with a float32 scale per token


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """Attention metadata of one KV group for one step (device tensors, int32).

    block_tables: [rows, max_blocks], indexed by the state row of a sequence; entries outside a window are unused.
    slots: [tokens], where each token's K and V go (block_id * block_size + offset); -1 for padding.
    """

    block_tables: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a forward pass reads besides the tokens. Built by models/runtime/inputs.py; device tensors int32.

    rows: [num_seqs], the state row of each scheduled sequence. query_start: [num_seqs + 1], offsets into the tokens.
    seq_lens: [num_seqs], KV length including this step. positions: [tokens]. num_decodes: the first `num_decodes`
    sequences have exactly one token each. max_query, max_seq_len: upper bounds known on the host. `host` carries the
    same metadata as plain lists for backends that compute on the host (query_start, seq_lens, rows).
    """

    rows: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    positions: torch.Tensor
    groups: tuple[GroupInputs, ...]
    num_tokens: int
    num_seqs: int
    num_decodes: int
    max_query: int
    max_seq_len: int
    host: HostInputs


@dataclass(frozen=True, slots=True)
class HostInputs:
    """StepInputs's metadata as lists on the host."""

    rows: list[int]
    query_start: list[int]
    seq_lens: list[int]
    block_tables: tuple[list[list[int]], ...]  # per group, per scheduled sequence


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's share of the KVCachePool: k and v are [num_blocks, kv_heads, block_size, head_dim], or v is
    [num_blocks, kv_heads, head_dim, block_size] where the backend's kernels want it so.

    k_scale, v_scale: float32 scalars for FP8 storage (stored = value / scale), None otherwise.
    """

    k: torch.Tensor
    v: torch.Tensor
    group: int
    block_size: int
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampleInputs:
    """Per-row sampling state of the `m` rows that draw a token in this step (device tensors).

    Parameters are [m]: temperature (0: greedy), top_k (0: off), top_p, min_p, presence, frequency, repetition,
    key0, key1 (int32: the RNG key of (seed, choice, position, purpose)). Flags say on the host whether any row needs a
    stage, so that the plain case costs nothing. token_ids: the state table [rows, max_len]; state_rows, prompt_lens,
    lens: [m] (lens counts prompt and output). bias_ids / bias_values: [m, k] padded with id -1; banned ids (stop ids
    below min_tokens) are bias entries of -inf. num_logprobs: None, or the number of alternatives.
    allowed: [k, ceil(vocab / 32)] int32, bit i % 32 of word i // 32 for id i, of the k constrained rows, whose indices
    among the m are allowed_rows [k] int32; every row has an id that is allowed. Both None when no row is constrained.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    repetition: torch.Tensor
    key0: torch.Tensor
    key1: torch.Tensor
    token_ids: torch.Tensor
    state_rows: torch.Tensor
    prompt_lens: torch.Tensor
    lens: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    any_random: bool
    any_truncation: bool
    any_penalty: bool
    any_bias: bool
    num_logprobs: int | None
    allowed: torch.Tensor | None = None
    allowed_rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """ids: [m] int32 or int64. With log-probabilities: chosen [m], rank [m], top_ids [m, k], top_logprobs [m, k]."""

    ids: torch.Tensor
    chosen: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None


class Ops(Protocol):
    """One backend's operations."""

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """ids [tokens], table [vocab, hidden] -> [tokens, hidden]. Ids outside the table (another rank's) give 0."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat) -> Activation:
        """x [tokens, hidden] -> x / rms(x) * weight, in the form `out` (Zhang & Sennrich 2019)."""
        ...

    def add_rms_norm(
        self, x: Activation, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat
    ) -> tuple[Activation, torch.Tensor]:
        """residual' = residual + x; returns (rms_norm(residual'), residual'). x may be a Linear's partial sums."""
        ...

    def linear(self, x: Activation, weight: torch.Tensor, bias: torch.Tensor | None) -> Activation:
        """x [tokens, k] PLAIN, weight [n, k] -> [tokens, n]. Other weight formats bring their op with their scheme."""
        ...

    def rope_cache(
        self,
        qkv: Activation,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        cache: LayerCache,
        inputs: StepInputs,
    ) -> torch.Tensor:
        """qkv [tokens, (hq + 2 hkv) * d] -> q [tokens, hq, d], rotated; writes K (rotated) and V to the cache.

        rope: [max_positions, 2, rotary_dim // 2] float32 (cos, sin), half-split rotation (Su et al. 2021).
        q_norm, k_norm: per-head RMSNorm weights [d] applied before the rotation (Qwen3), or None.
        """
        ...

    def attention(
        self, q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None, out: ActFormat
    ) -> Activation:
        """Causal attention of q [tokens, hq, d] over the cache -> [tokens, hq * d]. Reads K and V as stored.

        window: a token at position p sees positions > p - window.
        """
        ...

    def silu_mul(self, gate_up: Activation, out: ActFormat) -> Activation:
        """gate_up [tokens, 2 * n] -> silu(gate) * up, [tokens, n]."""
        ...

    def sample(self, logits: torch.Tensor, inputs: SampleInputs) -> SampleOutput:
        """logits [m, vocab] of the model's dtype, taken as float32 -> one id per row.

        Order: allowed ids, bias and bans, penalties, (log-probabilities are taken from the raw logits before these),
        temperature, top_k, top_p, min_p, then argmax of logits / T + Gumbel noise. The noise of (row, id) depends on
        key0, key1 and id alone: h = mix(mix(id ^ key0) + key1) in uint32 with
        mix(x): x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16;
        u = (h >> 8) * 2^-24 + 2^-25; noise = -log(-log(u)). u is below 1, but in float32 it would round to 1 and the
        noise to infinity: above one half, take log1p(-(1 - u)). Greedy rows take the argmax, the lowest id on a tie.
        """
        ...

    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> SampleOutput:
        """Log-probabilities of the given ids [m] under logits [m, vocab] (prompt log-probabilities)."""
        ...
