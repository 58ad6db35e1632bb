"""NativeOps: CpuOps with the decode-time work of float32 models in one native call each, instead of many of torch's."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from hw.cpu.ops import CpuOps
from hw.ops import ActFormat, Activation, LayerCache, StepInputs

MAX_ROWS = 256  # above, torch's threads win
MAX_KEYS = 1 << 15  # keys of all tokens together: above, the library's one query at a time loses to torch's tiles
SPLIT_KEYS = 2048  # keys times heads from which attention is shared among threads; below, waking them costs more


@dataclass(frozen=True, slots=True)
class Queries:
    """A step's tokens, each as a query of its own: a prompt's chunk is as many decodes of growing length.

    rows, lens: [tokens] int32, the state row and the keys that a token sees (before a window); num_keys: their sum.
    """

    inputs: StepInputs
    rows: torch.Tensor
    lens: torch.Tensor
    num_keys: int

    @staticmethod
    def of(inputs: StepInputs) -> Queries:
        """Of a step without padding."""
        if inputs.max_query == 1:
            return Queries(inputs, inputs.rows, inputs.seq_lens, sum(inputs.host.seq_lens))
        lens = inputs.positions + 1
        rows = torch.repeat_interleave(inputs.rows, inputs.query_start.diff())
        return Queries(inputs, rows, lens, int(lens.sum()))


class NativeOps(CpuOps):
    """What the library does not do (bfloat16, long prompts) goes the way of CpuOps."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        super().__init__()
        self._library = library
        self._num_threads = num_threads
        # A one-row product is over in microseconds. On two cores the server's other processes run on the second one,
        # and waiting for a thread that they hold up costs more than half of the product saves.
        self._product_threads = num_threads if num_threads > 2 else 1
        # Weights never change once they are loaded. The copy is made at a weight's first use, which is a warm-up's.
        self._queries: Queries | None = None
        self._halves: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def linear(self, x: Activation, weight: torch.Tensor, bias: torch.Tensor | None) -> Activation:
        half = self._half_of(weight) if x.shape[0] == 1 and _native(x) else None
        if half is None:
            return super().linear(x, weight, bias)
        result = x.new_empty(1, weight.shape[0])
        at = None if bias is None else bias.data_ptr()
        self._library.product_half(
            x.data_ptr(), half.data_ptr(), at, result.data_ptr(), *weight.shape, self._product_threads
        )
        return result

    def _half_of(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The weight in bfloat16 when that loses nothing, as for every checkpoint that is stored so; else None."""
        known = self._halves.get(id(weight))
        if known is None or known[0] is not weight:
            half = weight.bfloat16().contiguous()
            exact = weight.shape[0] % 4 == 0 and bool((half.float() == weight).all())
            known = self._halves[id(weight)] = (weight, half if exact else None)
        return known[1]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat) -> Activation:
        if not _native(x):
            return super().rms_norm(x, weight, eps, out)
        result = torch.empty_like(x)
        self._library.add_rms_norm(
            None, x.data_ptr(), weight.data_ptr(), None, result.data_ptr(), x.shape[0], x.shape[1], eps
        )
        return result

    def add_rms_norm(
        self, x: Activation, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: ActFormat
    ) -> tuple[Activation, torch.Tensor]:
        if not (_native(x) and residual.is_contiguous()):
            return super().add_rms_norm(x, residual, weight, eps, out)
        result, total = torch.empty_like(x), torch.empty_like(residual)
        self._library.add_rms_norm(
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            total.data_ptr(),
            result.data_ptr(),
            x.shape[0],
            x.shape[1],
            eps,
        )
        return result, total

    def silu_mul(self, gate_up: Activation, out: ActFormat) -> Activation:
        if not _native(gate_up):
            return super().silu_mul(gate_up, out)
        rows, both = gate_up.shape
        result = gate_up.new_empty(rows, both // 2)
        self._library.silu_mul(gate_up.data_ptr(), result.data_ptr(), rows, both // 2)
        return result

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
        slots = inputs.groups[cache.group].slots
        if not (
            _native(qkv) and cache.k.dtype is torch.float32 and slots.dtype == inputs.positions.dtype == torch.int32
        ):
            return super().rope_cache(qkv, num_heads, num_kv_heads, head_dim, rope, q_norm, k_norm, eps, cache, inputs)
        q: torch.Tensor = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
        self._library.rope_cache(
            qkv.data_ptr(),
            q.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            rope.data_ptr(),
            inputs.positions.data_ptr(),
            slots.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            eps,
            qkv.shape[0],
            num_heads,
            num_kv_heads,
            head_dim,
            rope.shape[2],
            cache.block_size,
        )
        return q

    def attention(
        self, q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None, out: ActFormat
    ) -> Activation:
        tables = inputs.groups[cache.group].block_tables
        if not (
            inputs.num_tokens == q.shape[0]
            and _native(q)
            and cache.k.dtype is torch.float32
            and tables.is_contiguous()
            and tables.dtype == torch.int32
        ):
            return super().attention(q, cache, inputs, scale, window, out)
        queries = self._queries_of(inputs)
        if queries.num_keys > MAX_KEYS and inputs.max_query > 1:
            return super().attention(q, cache, inputs, scale, window, out)
        tokens, num_heads, head_dim = q.shape
        num_kv_heads = cache.k.shape[1]
        result = q.new_empty(tokens, num_heads * head_dim)
        longest = max(inputs.host.seq_lens)
        threads = 1 if queries.num_keys * num_heads < SPLIT_KEYS else self._num_threads
        scores = q.new_empty(threads, longest)
        self._library.decode_attention(
            q.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            tables.data_ptr(),
            queries.rows.data_ptr(),
            queries.lens.data_ptr(),
            result.data_ptr(),
            scores.data_ptr(),
            tokens,
            tables.shape[1],
            num_heads,
            num_kv_heads,
            head_dim,
            cache.block_size,
            -1 if window is None else window,
            longest,
            threads,
            scale,
        )
        return result

    def _queries_of(self, inputs: StepInputs) -> Queries:
        """The step's Queries; all layers of a step ask for the same."""
        if self._queries is None or self._queries.inputs is not inputs:
            self._queries = Queries.of(inputs)
        return self._queries


def _native(x: torch.Tensor) -> bool:
    """Whether the library takes this activation: float32, contiguous, few rows. Weights are of the same type."""
    return x.dtype is torch.float32 and x.shape[0] <= MAX_ROWS and x.is_contiguous()
