"""Attention: fused q, k, v; rotation and cache write; paged attention; output projection. Grouped K/V heads."""

from __future__ import annotations

import torch

from core.kv_layout import LayerKV
from hw.ops import Activation, LayerCache, StepInputs
from models.layers.linear import Linear, Slot, row_parallel
from models.layers.norm import Norm
from models.layers.parts import Parts
from models.layers.sharing import share_kv_heads


class Attention:
    """One layer's attention. Heads are shared among the ranks; K/V heads are repeated when there are fewer than ranks.

    Args:
        window: positions that a token sees, itself included; None for all.
        qk_norm: per-head RMSNorm of q and k before the rotation (Qwen3), with its eps.
    """

    def __init__(
        self,
        parts: Parts,
        name: str,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: torch.Tensor,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: float | None = None,
    ) -> None:
        self._parts = parts
        if num_heads % num_kv_heads:
            raise ValueError(f"{name}: {num_heads} heads cannot share {num_kv_heads} K/V heads equally")
        _, self._num_heads = parts.share(num_heads, f"{name} heads")
        size, rank = parts.comm.size, parts.comm.rank
        first_kv, self._num_kv_heads = share_kv_heads(num_kv_heads, rank, size, name)
        self._head_dim = head_dim
        self._rope = rope
        self._window = window
        kv = Slot(num_kv_heads * head_dim, first_kv * head_dim, self._num_kv_heads * head_dim)
        q = Slot(num_heads * head_dim, rank * self._num_heads * head_dim, self._num_heads * head_dim)
        self.qkv = Linear(parts, f"{name}.qkv", {"q": q, "k": kv, "v": kv}, hidden_size, bias=qkv_bias)
        self.out = row_parallel(parts, f"{name}.out", hidden_size, num_heads * head_dim, bias=out_bias)
        self._q_norm = Norm(parts, f"{name}.q_norm", head_dim, qk_norm) if qk_norm is not None else None
        self._k_norm = Norm(parts, f"{name}.k_norm", head_dim, qk_norm) if qk_norm is not None else None
        self._eps = qk_norm or 0.0

    @property
    def kv(self) -> LayerKV:
        """What this rank stores per token."""
        return LayerKV(self._num_kv_heads, self._head_dim, self._window)

    def __call__(self, x: Activation, inputs: StepInputs, cache: LayerCache) -> Activation:
        ops = self._parts.backend.ops
        q = ops.rope_cache(
            self.qkv(x),
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            self._rope,
            self._q_norm.weight if self._q_norm is not None else None,
            self._k_norm.weight if self._k_norm is not None else None,
            self._eps,
            cache,
            inputs,
        )
        return self.out(ops.attention(q, cache, inputs, self._head_dim**-0.5, self._window, self.out.input_format))
