"""Every CPU op against an independent plain formula, in loops over tokens and heads, with fresh random inputs."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from hw.cpu import native
from hw.cpu.native_ops import NativeOps
from hw.cpu.ops import CpuOps
from hw.ops import ActFormat, GroupInputs, HostInputs, LayerCache, StepInputs

PLAIN = ActFormat.PLAIN
BLOCK_SIZE = 8


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within float32's rounding, or bfloat16's."""
    tolerance = 2e-5 if got.dtype == torch.float32 else 0.03
    torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)


class Step:
    """A step over random sequences (length, new tokens; decodes first) with scattered blocks and `padding` rows."""

    def __init__(self, sequences: list[tuple[int, int]], padding: int = 0) -> None:
        self.sequences = sequences
        counts = [-(-length // BLOCK_SIZE) for length, _ in sequences]
        # Block 0 belongs to nobody: decodes are padded with it, and its values must not show.
        blocks = list(range(1, sum(counts) + 1))
        self.num_blocks = len(blocks) + 1
        random.shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in counts]
        self.positions = [list(range(length - new, length)) for length, new in sequences]
        slots = [self.slot(s, p) for s, row in enumerate(self.positions) for p in row] + [-1] * padding
        starts = [0]
        for _, new in sequences:
            starts.append(starts[-1] + new)
        lens = [length for length, _ in sequences]
        rows = list(range(len(sequences)))
        width = max(counts)
        table = torch.tensor([t + [-1] * (width - len(t)) for t in self.tables], dtype=torch.int32)
        self.tokens = starts[-1] + padding
        self.inputs = StepInputs(
            rows=torch.tensor(rows, dtype=torch.int32),
            query_start=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            positions=torch.tensor([p for row in self.positions for p in row] + [0] * padding, dtype=torch.int32),
            groups=(GroupInputs(table, torch.tensor(slots, dtype=torch.int32)),),
            num_tokens=starts[-1],
            num_seqs=len(sequences),
            num_decodes=sum(new == 1 for _, new in sequences),
            max_query=max(new for _, new in sequences),
            max_seq_len=max(lens),
            host=HostInputs(rows, starts, lens, (self.tables,)),
        )

    def slot(self, sequence: int, position: int) -> int:
        return self.tables[sequence][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    def cache(self, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> LayerCache:
        shape = (self.num_blocks, kv_heads, BLOCK_SIZE, head_dim)
        k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        return LayerCache(k, v, 0, BLOCK_SIZE)


def test_embed() -> None:
    table, ids = torch.randn(7, 5), torch.tensor([0, 6, -1, 7, 3, -100], dtype=torch.int32)
    want = torch.stack([table[i] if 0 <= i < 7 else torch.zeros(5) for i in ids.tolist()])
    assert torch.equal(CpuOps().embed(ids, table), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(5, 33).to(dtype), torch.randn(5, 33).to(dtype), torch.rand(33).to(dtype))

    def norm(values: torch.Tensor) -> torch.Tensor:
        wide = values.double()
        return wide / (wide.pow(2).mean(1, keepdim=True) + 0.1).sqrt() * weight.double()

    kept = residual.clone()
    close(CpuOps().rms_norm(x, weight, 0.1, PLAIN), norm(x))
    got, total = CpuOps().add_rms_norm(x, residual, weight, 0.1, PLAIN)
    close(total, x.double() + residual.double())
    close(got, norm(total))
    assert torch.equal(residual, kept), "the caller's residual is its own"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_and_silu_mul(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(5, 12).to(dtype), torch.randn(8, 12).to(dtype), torch.randn(8).to(dtype)
    product = torch.tensor(
        [[sum(a * b for a, b in zip(r, w, strict=True)) for w in weight.tolist()] for r in x.tolist()]
    )
    close(CpuOps().linear(x, weight, None), product)
    close(CpuOps().linear(x, weight, bias), product + bias.float())
    gate, up = x[:, :6].double(), x[:, 6:].double()
    close(CpuOps().silu_mul(x, PLAIN), gate / (1 + torch.exp(-gate)) * up)


def rotated(x: list[float], angles: torch.Tensor) -> list[float]:
    """Half-split rotation of one head by (cos, sin) [2, n]; dimensions beyond 2 n stay."""
    n = angles.shape[1]
    cos, sin = angles.tolist()
    first = [x[i] * cos[i] - x[i + n] * sin[i] for i in range(n)]
    second = [x[i + n] * cos[i] + x[i] * sin[i] for i in range(n)]
    return first + second + x[2 * n :]


def normed(x: list[float], weight: torch.Tensor | None) -> list[float]:
    if weight is None:
        return x
    root = math.sqrt(sum(v * v for v in x) / len(x) + 1e-3)
    return [v / root * w for v, w in zip(x, weight.tolist(), strict=True)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("rotary", [8, 6])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_cache(heads: int, kv_heads: int, rotary: int, with_norm: bool) -> None:
    step = Step([(random.randint(1, 30), 1), (25, 9), (7, 7)], padding=2)
    cache = step.cache(kv_heads, 8)
    before = cache.k.clone(), cache.v.clone()
    qkv, rope = torch.randn(step.tokens, (heads + 2 * kv_heads) * 8), torch.randn(40, 2, rotary // 2)
    q_norm, k_norm = (torch.rand(8) + 0.5 if with_norm else None for _ in range(2))
    q = CpuOps().rope_cache(qkv, heads, kv_heads, 8, rope, q_norm, k_norm, 1e-3, cache, step.inputs)
    token = 0
    for sequence, positions in enumerate(step.positions):
        for position in positions:
            row = qkv[token].view(-1, 8).tolist()
            angles = rope[position]
            want = [rotated(normed(row[h], q_norm), angles) for h in range(heads)]
            close(q[token], torch.tensor(want))
            block, offset = divmod(step.slot(sequence, position), BLOCK_SIZE)
            for h in range(kv_heads):
                close(cache.k[block, h, offset], torch.tensor(rotated(normed(row[heads + h], k_norm), angles)))
                assert cache.v[block, h, offset].tolist() == row[heads + kv_heads + h]
                before[0][block, h, offset] = cache.k[block, h, offset]
                before[1][block, h, offset] = cache.v[block, h, offset]
            token += 1
    assert torch.equal(cache.k, before[0]), "a slot that is nobody's was written"
    assert torch.equal(cache.v, before[1]), "a slot that is nobody's was written"


DECODES = [(n, 1) for n in (1, 8, 9, 40, 300, 310, 700)]


@pytest.mark.parametrize("sequences", [DECODES, [(9, 1), (30, 1), (40, 13), (20, 20), (600, 300)], [(1, 1)], [(17, 5)]])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(sequences: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    step = Step(sequences, padding=3)
    heads, kv_heads = random.choice([(4, 2), (2, 2), (6, 1)])
    cache = step.cache(kv_heads, 16, dtype)
    q = torch.randn(step.tokens, heads, 16).to(dtype)
    got = CpuOps().attention(q, cache, step.inputs, 0.3, window, PLAIN).view(step.tokens, heads, 16)
    token = 0
    for sequence, positions in enumerate(step.positions):
        slots = torch.tensor([step.slot(sequence, p) for p in range(positions[-1] + 1)])
        k = cache.k.transpose(1, 2).reshape(-1, kv_heads, 16)[slots].double()
        v = cache.v.transpose(1, 2).reshape(-1, kv_heads, 16)[slots].double()
        for position in positions:
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                of = head // (heads // kv_heads)
                weights = (k[first : position + 1, of] @ q[token, head].double() * 0.3).softmax(0)
                close(got[token, head], weights @ v[first : position + 1, of])
            token += 1
    assert bool(torch.isfinite(got).all()), "padding rows must stay finite"


def test_other_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="fp8_token"):
        CpuOps().silu_mul(torch.zeros(1, 2), ActFormat.FP8_TOKEN)


def native_ops(folder: Path) -> NativeOps:
    library = native.load(folder)
    if library is None:
        pytest.skip("no C compiler on this machine")
    return NativeOps(library, 1)


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("path", ["torch", "native", "bfloat16"])
def test_what_others_left_in_the_cache_never_shows(path: str, kind: str, window: int | None, tmp_path: Path) -> None:
    """NaN in every slot that belongs to no token of the step's sequences: block 0, free blocks, tails of last blocks.

    And in all of a poisoned mate's: its own row is NaN then, and nobody else's.
    """
    decodes, prefills = [(3, 1), (13, 1), (60, 1), (24, 1)], [(21, 21), (30, 5), (5, 2)]
    sequences = {"decode": decodes, "prefill": prefills, "mixed": decodes + prefills}[kind]
    ops = native_ops(tmp_path) if path == "native" else CpuOps()
    dtype = torch.bfloat16 if path == "bfloat16" else torch.float32
    step = Step(sequences)
    step.num_blocks += 3
    cache = step.cache(2, 8, dtype)
    q = torch.randn(step.tokens, 4, 8).to(dtype)
    want = ops.attention(q, cache, step.inputs, 0.3, window, PLAIN).clone()
    poisoned = len(sequences) - 1
    for mate in (None, poisoned):
        kept = [step.slot(s, p) for s, (n, _) in enumerate(sequences) if s != mate for p in range(n)]
        foreign = torch.ones(step.num_blocks * BLOCK_SIZE, dtype=torch.bool)
        foreign[kept] = False
        hidden = foreign.view(step.num_blocks, 1, BLOCK_SIZE, 1)
        dirty = LayerCache(cache.k.masked_fill(hidden, math.nan), cache.v.masked_fill(hidden, math.nan), 0, BLOCK_SIZE)
        got = ops.attention(q, dirty, step.inputs, 0.3, window, PLAIN)
        end = step.inputs.host.query_start[poisoned] if mate is not None else step.tokens
        torch.testing.assert_close(got[:end], want[:end], atol=0, rtol=0)
        assert bool(got[end:].isnan().all())
