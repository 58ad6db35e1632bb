"""The operations on CUDA and ROCm: Triton kernels, and torch's own products where they are near the limit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hw.cpu import sample as reference
from hw.cuda.add_rms_norm import add_rms_norm, rms_norm
from hw.cuda.attention_decode import attention_decode
from hw.cuda.attention_finish import attention_finish
from hw.cuda.attention_prefill import attention_prefill
from hw.cuda.embed import embed
from hw.cuda.fp8_linear import fp8_linear
from hw.cuda.product import Fp8, Product
from hw.cuda.rope_cache import rope_cache
from hw.cuda.sample import sample
from hw.cuda.silu_mul import silu_mul
from hw.ops import ActFormat, Activation, LayerCache, SampleInputs, SampleOutput, StepInputs


class CudaOps:
    """hw.ops.Ops. An Activation is a tensor, a Product that its consumer finishes, or Fp8.

    Nothing here looks at the values of a step, so a captured step is right for every other one of its padded size.

    Args:
        pdl: dependent launches may overlap.
    """

    def __init__(self, device: torch.device, pdl: bool) -> None:
        self._pdl = pdl
        self._unit = torch.ones((), dtype=torch.float32, device=device)

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return embed(ids, table)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat) -> Activation:
        return rms_norm(x, weight, eps, fp8=out is ActFormat.FP8_TOKEN, pdl=self._pdl)

    def add_rms_norm(
        self, x: Activation, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat
    ) -> tuple[Activation, torch.Tensor]:
        return add_rms_norm(x, residual, weight, eps, fp8=out is ActFormat.FP8_TOKEN, pdl=self._pdl)

    def linear(self, x: Activation, weight: torch.Tensor, bias: torch.Tensor | None) -> Activation:
        return F.linear(x, weight, bias)

    def fp8_linear(self, x: Fp8, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """x Fp8 [tokens, k], weight [n, k] e4m3, scale [n] -> Product [tokens, n]. The op of the fp8 scheme."""
        return fp8_linear(x, weight, scale, bias, torch.bfloat16, self._unit, pdl=self._pdl)

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
        return rope_cache(
            qkv, num_heads, num_kv_heads, head_dim, rope, inputs.positions, inputs.groups[cache.group].slots, cache.k,
            cache.v, k_scale=cache.k_scale, v_scale=cache.v_scale, q_norm=q_norm, k_norm=k_norm, eps=eps, pdl=self._pdl,
        )  # fmt: skip

    def attention(
        self, q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None, out: ActFormat
    ) -> Activation:
        tables = inputs.groups[cache.group].block_tables
        shared: tuple[Any, ...] = (
            q, cache.k, cache.v, tables, inputs.rows, inputs.query_start, inputs.seq_lens, scale, window
        )  # fmt: skip
        scales: dict[str, Any] = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
        fp8 = out is ActFormat.FP8_TOKEN
        if inputs.max_query == 1:
            parts = attention_decode(*shared, **scales, pdl=self._pdl)
            return attention_finish(parts, inputs.query_start, inputs.seq_lens, q, fp8=fp8, pdl=self._pdl)
        # Decodes stream the cache and chunks compute: side by side they take little longer than one of them. With
        # dependent launches the decodes start as soon as all programs of the chunks run.
        attended = torch.empty_like(q)
        attention_prefill(*shared, out=attended, **scales, pdl=self._pdl)
        parts = attention_decode(*shared, **scales, late=self._pdl, pdl=self._pdl)
        return attention_finish(parts, inputs.query_start, inputs.seq_lens, attended, fp8=fp8, pdl=self._pdl)

    def silu_mul(self, gate_up: Activation, out: ActFormat) -> Activation:
        return silu_mul(gate_up, fp8=out is ActFormat.FP8_TOKEN, pdl=self._pdl)

    def sample(self, logits: torch.Tensor, inputs: SampleInputs) -> SampleOutput:
        if inputs.any_truncation or inputs.any_penalty or inputs.any_bias:
            return reference.sample(logits, inputs)
        allowed = reference.constrained(logits, inputs).contiguous()
        if inputs.any_random:
            ids = sample(allowed, inputs.temperature, inputs.key0, inputs.key1)
        else:
            ids = sample(allowed, None, None, None)
        return SampleOutput(ids) if inputs.num_logprobs is None else self.logprobs(logits, ids, inputs.num_logprobs)

    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> SampleOutput:
        return reference.logprobs(logits, ids, num_top)
