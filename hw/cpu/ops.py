"""The operations in plain torch: correct everywhere, the oracle of every kernel, and quick for small models on a CPU.

What all layers of a step share (cache indices, masks, rotations) is computed once: see StepPlan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hw.cpu import sample
from hw.cpu.plan import StepPlan
from hw.ops import ActFormat, Activation, LayerCache, SampleInputs, SampleOutput, StepInputs


def _plain(out: ActFormat) -> None:
    if out is not ActFormat.PLAIN:
        raise ValueError(f"the CPU makes only plain activations, not {out.value}")


class CpuOps:
    """hw.ops.Ops in torch. StepInputs must be a new object for each step: the plan is kept under its identity."""

    def __init__(self) -> None:
        self._plan: StepPlan | None = None

    def plan(self, inputs: StepInputs) -> StepPlan:
        """What the layers of one step share."""
        if self._plan is None or self._plan.inputs is not inputs:
            self._plan = StepPlan(inputs)
        return self._plan

    def embed(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        outside = (ids < 0) | (ids >= table.shape[0])
        return F.embedding(ids.masked_fill(outside, 0), table).masked_fill_(outside[:, None], 0)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat) -> Activation:
        _plain(out)
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: Activation, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat
    ) -> tuple[Activation, torch.Tensor]:
        _plain(out)
        residual = residual + x
        return F.rms_norm(residual, weight.shape, weight, eps), residual

    def linear(self, x: Activation, weight: torch.Tensor, bias: torch.Tensor | None) -> Activation:
        return F.linear(x, weight, bias)

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
        plan = self.plan(inputs)
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        qk = heads[:, : num_heads + num_kv_heads]
        if q_norm is not None and k_norm is not None:
            q = F.rms_norm(qk[:, :num_heads], q_norm.shape, q_norm, eps)
            k = F.rms_norm(qk[:, num_heads:], k_norm.shape, k_norm, eps)
            qk = torch.cat((q, k), dim=1)
        cos, sin = plan.rotation(rope, qk.dtype)
        first, second = qk[..., : cos.shape[-1] // 2], qk[..., cos.shape[-1] // 2 : cos.shape[-1]]
        swapped = torch.cat((second, first), dim=-1)
        if cos.shape[-1] == head_dim:
            rotated = torch.addcmul(qk * cos, swapped, sin)
        else:
            turned = torch.addcmul(qk[..., : cos.shape[-1]] * cos, swapped, sin)
            rotated = torch.cat((turned, qk[..., cos.shape[-1] :]), dim=-1)
        kept, index = plan.store_index(cache)
        k, v = rotated[:, num_heads:], heads[:, num_heads + num_kv_heads :]
        if kept is not None:
            k, v = k[kept], v[kept]
        for store, value, scale in ((cache.k, k, cache.k_scale), (cache.v, v, cache.v_scale)):
            raw, new = _raw(store), _stored(value.reshape(-1, head_dim), store.dtype, scale)
            raw.view(-1, head_dim).index_copy_(0, index, new)
        return rotated[:, :num_heads]

    def attention(
        self, q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None, out: ActFormat
    ) -> Activation:
        _plain(out)
        tokens, num_heads, head_dim = q.shape
        num_kv_heads = cache.k.shape[1]
        folded = q.view(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        result = torch.zeros_like(folded) if tokens > inputs.num_tokens else torch.empty_like(folded)
        plan = self.plan(inputs)
        for group in plan.decodes(cache, window, q.dtype):
            # The heads that share a K/V head stand as queries of one head: SDPA then reads K and V once.
            k, v = _gather(cache, group.index, q.dtype)
            if group.hidden is not None:
                row, key = group.hidden
                k[row, :, key] = v[row, :, key] = 0.0
            rows = slice(inputs.num_decodes) if group.rows is None else group.rows
            result[rows] = F.scaled_dot_product_attention(folded[rows], k, v, attn_mask=group.mask, scale=scale)
        for chunk in plan.chunks(cache, window, q.dtype):
            k, v = _gather(cache, chunk.index, q.dtype)
            for piece in chunk.pieces:
                # [group, kv_heads, queries, d] against K and V repeated by stride alone.
                some = folded[piece.start : piece.stop].permute(2, 1, 0, 3)
                shape = (some.shape[0], num_kv_heads, piece.keys, head_dim)
                answer = F.scaled_dot_product_attention(
                    some,
                    k[:, :, : piece.keys].expand(shape),
                    v[:, :, : piece.keys].expand(shape),
                    attn_mask=piece.mask,
                    scale=scale,
                )
                result[piece.start : piece.stop] = answer.permute(2, 1, 0, 3)
        return result.view(tokens, num_heads * head_dim)

    def silu_mul(self, gate_up: Activation, out: ActFormat) -> Activation:
        _plain(out)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def sample(self, logits: torch.Tensor, inputs: SampleInputs) -> SampleOutput:
        return sample.sample(logits, inputs)

    def logprobs(self, logits: torch.Tensor, ids: torch.Tensor, num_top: int) -> SampleOutput:
        return sample.logprobs(logits, ids, num_top)


def _gather(cache: LayerCache, index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """index [seqs, kv_heads, blocks] of (block, head) pairs -> K and V [seqs, kv_heads, blocks * block_size, d]."""
    num_blocks, num_kv_heads, block_size, head_dim = cache.k.shape
    shape = (index.shape[0], num_kv_heads, index.shape[2] * block_size, head_dim)
    k, v = (
        _raw(store).view(num_blocks * num_kv_heads, block_size * head_dim).index_select(0, index.view(-1)).view(shape)
        for store in (cache.k, cache.v)
    )
    if cache.k_scale is None or cache.v_scale is None:
        return k.to(dtype), v.to(dtype)
    k, v = (raw.view(cache.k.dtype).float() * scale for raw, scale in ((k, cache.k_scale), (v, cache.v_scale)))
    return k.to(dtype), v.to(dtype)


def _raw(store: torch.Tensor) -> torch.Tensor:
    """FP8 as bytes: torch moves those on a CPU, and not FP8."""
    return store.view(torch.uint8) if store.dtype.itemsize == 1 else store


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """x in the cache's type, FP8 as bytes; what the scale leaves beyond FP8's largest is clipped to it."""
    if scale is None:
        return x.to(dtype)
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp_(-largest, largest).to(dtype).view(torch.uint8)
