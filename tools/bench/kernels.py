"""Every kernel against its limit on this GPU, in replayed graphs over rotated buffers: python -m tools.bench.kernels

The limit is the larger of bytes over the copy bandwidth and operations over the product rate, both measured on an
H200. `--steps` also measures whole forward passes of an 8B-shaped model, replayed as the server replays them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hw.comm import Comm
from hw.cuda.add_rms_norm import add_rms_norm
from hw.cuda.attention_decode import attention_decode
from hw.cuda.attention_finish import attention_finish
from hw.cuda.attention_prefill import attention_prefill
from hw.cuda.backend import make
from hw.cuda.fp8_linear import fp8_linear
from hw.cuda.graphs import StepGraphs
from hw.cuda.product import Fp8, Product
from hw.cuda.rope_cache import rope_cache
from hw.cuda.sample import sample
from hw.cuda.silu_mul import silu_mul
from hw.cuda.target import FP8
from hw.kvcache import KVLayout
from hw.ops import GroupInputs, HostInputs, StepInputs
from hw.quant.scheme import make_scheme
from models import llama
from models.layers.decoder import Decoder
from models.layers.parts import Parts

BANDWIDTH = 4.25e12  # bytes/s, copy
FP8_RATE, BF16_RATE = 1350e12, 730e12  # operations/s, cuBLASLt
L2_BYTES = 320 << 20  # rotate over this much: several times the L2
BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
SIZE = 32  # tokens of a block
HIDDEN, INTER, HEADS, KV_HEADS, DIM, VOCAB, LAYERS = 4096, 14336, 32, 8, 128, 128256, 32

# Steps of a whole model: decodes at a context of 640, and chunks that end a prompt of 512.
STEPS: tuple[tuple[int, list[int]], ...] = (
    (1, []), (8, []), (32, []), (64, []), (256, []), (8, [120]), (30, [130]), (62, [130]), (124, [260]),
    (124, [194, 194]), (250, [259, 259]), (0, [512] * 4),
)  # fmt: skip

Call = Callable[[int], Any]


def graph_time_us(call: Call, repeats: int) -> float:
    """Median microseconds of call(i), i counting the copies of its buffers."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            call(i)
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times[2:])) * 1e3 / repeats


def fp8(*shape: int) -> torch.Tensor:
    out = torch.empty(shape, dtype=FP8, device="cuda")
    for row in torch.split(out.view(-1, shape[-1]), 8192):
        row.copy_(torch.randn(row.shape, device="cuda", dtype=BF16))
    return out


def scales(n: int) -> torch.Tensor:
    return torch.rand(n, device="cuda") + 0.5


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


Line = tuple[str, Call, int, float, float, float]
"""name, call, number of buffer copies, bytes, operations, operations/s of their kind"""


def products(pdl: bool) -> Iterator[Line]:
    unit = torch.ones((), device="cuda")
    shapes = (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336))
    for name, n, k in shapes:
        copies = max(2, -(-L2_BYTES // (n * k)))
        weights, col = [fp8(n, k) for _ in range(copies)], scales(n)
        for m in (1, 16, 32, 64, 128, 192, 256, 384, 448, 512, 640, 768, 832, 1024, 2048):
            x = Fp8(fp8(m, k), scales(m))

            def call(i: int, x: Fp8 = x, weights: list[torch.Tensor] = weights, col: torch.Tensor = col) -> Any:
                return fp8_linear(x, weights[i % len(weights)], col, None, BF16, unit, pdl=pdl)

            yield f"fp8_linear {name} M={m}", call, copies, n * k + m * (k + 2 * n), 2 * m * n * k, FP8_RATE


def fused(pdl: bool) -> Iterator[Line]:
    weight, rope = randn(HIDDEN), torch.rand(8192, 2, DIM // 2, device="cuda")
    width = (HEADS + 2 * KV_HEADS) * DIM
    caches = [fp8(256, KV_HEADS, SIZE, DIM), fp8(256, KV_HEADS, DIM, SIZE)]
    one = torch.ones((), device="cuda")
    for m in (1, 16, 64, 192, 768, 2048):
        small = m <= 32  # then the products leave parts in float32
        row, residual = scales(m), randn(m, HIDDEN)
        positions = torch.arange(m, dtype=I32, device="cuda")
        parts, qkv = (
            Product(randn(splits if small else 1, m, n, dtype=F32 if small else BF16), BF16, row, scales(n))
            for splits, n in ((4, HIDDEN), (2, width))
        )
        gate_up = Product(randn(1, m, 2 * INTER), BF16, row, scales(2 * INTER))

        def norm(i: int, x: Product = parts, residual: torch.Tensor = residual) -> Any:
            return add_rms_norm(x, residual, weight, 1e-5, fp8=True, pdl=pdl)

        def silu(i: int, x: Product = gate_up) -> Any:
            return silu_mul(x, fp8=True, pdl=pdl)

        def rotate(i: int, x: Product = qkv, at: torch.Tensor = positions) -> Any:
            return rope_cache(
                x, HEADS, KV_HEADS, DIM, rope, at, at, *caches, k_scale=one, v_scale=one, pdl=pdl
            )  # fmt: skip

        size = parts.values.numel() * parts.values.itemsize + m * HIDDEN * 5
        yield f"add_rms_norm+fp8 M={m}", norm, 8, size, 0, BF16_RATE
        yield f"silu_mul+fp8 M={m}", silu, 8, m * INTER * 5, 0, BF16_RATE
        size = qkv.values.numel() * qkv.values.itemsize + m * width * 2
        yield f"rope_cache fp8 M={m}", rotate, 8, size, 0, BF16_RATE
    for m in (1, 16, 64, 256):
        logits, keys = randn(m, VOCAB, dtype=F32), torch.ones(m, dtype=I32, device="cuda")

        def greedy(i: int, x: torch.Tensor = logits) -> Any:
            return sample(x, None, None, None)

        def random(
            i: int,
            x: torch.Tensor = logits,
            k: torch.Tensor = keys,
            heat: torch.Tensor = scales(m),  # noqa: B008
        ) -> Any:
            return sample(x, heat, k, k)

        yield f"sample greedy M={m}", greedy, 8, 4 * m * VOCAB, 0, BF16_RATE
        yield f"sample random M={m}", random, 8, 4 * m * VOCAB, 0, BF16_RATE


def batch(lens: list[int], counts: list[int], size: int = SIZE) -> tuple[list[torch.Tensor], int]:
    """Block tables, rows, query_start and seq_lens on the device, and the number of blocks."""
    width = max(-(-n // size) for n in lens)
    total = sum(-(-n // size) for n in lens)
    free = torch.randperm(total, dtype=I32)
    tables = torch.zeros(len(lens), width, dtype=I32)
    at = 0
    for row, n in enumerate(lens):
        used = -(-n // size)
        tables[row, :used] = free[at : at + used]
        at += used
    starts = [sum(counts[:i]) for i in range(len(lens) + 1)]
    lists = (list(range(len(lens))), starts, lens)
    return [tables.cuda(), *(torch.tensor(x, dtype=I32, device="cuda") for x in lists)], total


def attention(pdl: bool) -> Iterator[Line]:
    one = torch.ones((), device="cuda")
    for store in (BF16, FP8):
        name = "fp8" if store is FP8 else "bf16"
        scaled: dict[str, Any] = {"k_scale": one, "v_scale": one} if store is FP8 else {}

        def cache(blocks: int, store: torch.dtype = store) -> list[torch.Tensor]:
            if store is FP8:
                return [fp8(blocks, KV_HEADS, SIZE, DIM), fp8(blocks, KV_HEADS, DIM, SIZE)]
            return [randn(blocks, KV_HEADS, SIZE, DIM) for _ in range(2)]

        for seqs, length in ((1, 640), (16, 640), (64, 640), (256, 640), (1, 32768), (16, 8192)):
            data, blocks = batch([length] * seqs, [1] * seqs)
            copies = max(1, min(8, -(-L2_BYTES // (blocks * SIZE * 2 * KV_HEADS * DIM))))

            def decode(
                i: int,
                q: torch.Tensor = randn(seqs, HEADS, DIM),  # noqa: B008
                caches: list[list[torch.Tensor]] = [cache(blocks) for _ in range(copies)],  # noqa: B006, B008
                data: Any = data,
                scaled: dict[str, Any] = scaled,
            ) -> Any:
                k, v = caches[i % len(caches)]
                parts = attention_decode(
                    q, k, v, data[0], data[1], data[2], data[3], DIM**-0.5, None, pdl=pdl, **scaled
                )
                return attention_finish(parts, data[2], data[3], q, fp8=True, pdl=pdl)

            yield f"attention_decode {name} {seqs}x{length}", decode, copies, (
                seqs * length * 2 * KV_HEADS * DIM * store.itemsize), 0, BF16_RATE  # fmt: skip
        for what, lens, counts in (
            ("1x512", [512], [512]), ("8x512", [512] * 8, [512] * 8), ("1x8192", [8192], [8192]),
            ("2048 after 6144", [8192], [2048]), ("128 after 384", [512], [128]),
        ):  # fmt: skip
            data, blocks = batch(lens, counts)

            def prefill(
                i: int,
                q: torch.Tensor = randn(sum(counts), HEADS, DIM),  # noqa: B008
                kv: Any = cache(blocks),  # noqa: B008
                data: Any = data,
                scaled: dict[str, Any] = scaled,
            ) -> Any:
                return attention_prefill(
                    q,
                    kv[0],
                    kv[1],
                    data[0],
                    data[1],
                    data[2],
                    data[3],
                    DIM**-0.5,
                    None,
                    out=torch.empty_like(q),
                    **scaled,
                )

            pairs = sum(c * (n - c) + c * (c + 1) / 2 for n, c in zip(lens, counts, strict=True))
            yield f"attention_prefill {name} {what}", prefill, 2, 0, 4 * pairs * HEADS * DIM, BF16_RATE


def measure(pdl: bool) -> None:
    print("| kernel | µs | limit µs | share | rate |\n|---|--:|--:|--:|--:|")
    for group in (products, fused, attention):
        for name, call, copies, size, operations, peak in group(pdl):
            limit = max(size / BANDWIDTH, operations / peak) * 1e6
            try:
                repeats = copies * max(1, -(-40 // copies)) if limit < 200 else copies
                us = graph_time_us(call, repeats)
            except Exception as error:
                print(f"| {name} | failed: {type(error).__name__}: {str(error)[:150]} |", flush=True)
                continue
            streams = size / BANDWIDTH >= operations / peak
            rate = f"{size / us / 1e6:.2f} TB/s" if streams else f"{operations / us / 1e6:.0f} TFLOP/s"
            print(f"| {name} | {us:.2f} | {limit:.2f} | {limit / us:.0%} | {rate} |", flush=True)
        torch.cuda.empty_cache()


def steps(quantization: str, store: torch.dtype, layers: int) -> None:
    """Whole forward passes of an 8B-shaped model with random weights: decode-only and mixed, as replayed graphs."""
    backend = make(0, None)
    facts = backend.capabilities
    parts = Parts(backend, Comm(), make_scheme(quantization, facts), make_scheme("none", facts), BF16)
    config = llama.config({
        "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": INTER, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 8192,
    })  # fmt: skip
    begin_s = time.monotonic()
    model = Decoder(config, parts, 8192)
    generator = torch.Generator(backend.device).manual_seed(0)
    for weight in parts.weights.values():
        weight.fill(generator)
    torch.cuda.synchronize()
    print(f"8B {quantization}, {layers} layers: weights in {time.monotonic() - begin_s:.1f} s", flush=True)
    layout = KVLayout.build(model.kv_layers, SIZE, store).with_blocks(8192)
    pool = backend.make_kv_cache(layout)
    tables = torch.randint(1, 8192, (264, 512), dtype=I32, device="cuda")
    graphs = StepGraphs(model.forward, backend.device, 2048, 264)
    for decodes, chunks in STEPS:
        lens, counts = [640] * decodes + [512] * len(chunks), [1] * decodes + chunks
        tokens, seqs = sum(counts), len(lens)
        size = graphs.pad(tokens)
        starts = [sum(counts[:i]) for i in range(seqs + 1)]
        positions = [n - c + i for n, c in zip(lens, counts, strict=True) for i in range(c)]
        ints = [torch.tensor(x, dtype=I32, device="cuda") for x in (list(range(seqs)), starts, lens, positions)]
        slots = torch.randperm(16000, device="cuda")[:size].to(I32) + SIZE
        step = StepInputs(
            ints[0], ints[1], ints[2], torch.nn.functional.pad(ints[3], (0, size - tokens)),
            (GroupInputs(tables, slots),), tokens, seqs, seqs, max(counts), max(lens), HostInputs([], [], [], ()),
        )  # fmt: skip
        ids = torch.randint(0, VOCAB, (size,), dtype=I32, device="cuda")
        if not graphs.num_replays:
            begin_s = time.monotonic()
            graphs(ids, step, pool.layers)
            torch.cuda.synchronize()
            print(f"captured {2 * len(graphs.sizes)} graphs in {time.monotonic() - begin_s:.1f} s", flush=True)
        hidden = graphs(ids, step, pool.layers)[:tokens].clone()
        eager = model.forward(ids, step, pool.layers)[:tokens]
        again = graphs(ids, step, pool.layers)[:tokens]
        error = float((hidden.float() - eager.float()).norm() / eager.float().norm())
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graphs(ids, step, pool.layers)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        last = torch.tensor(starts[1:], device="cuda") - 1

        def head(i: int, hidden: torch.Tensor = hidden, at: torch.Tensor = last) -> Any:
            return sample(model.logits(hidden[at]), None, None, None)

        head_us = graph_time_us(head, 4)
        note = f"graph-eager {error:.1e}, repeatable {bool(torch.equal(hidden, again))}"
        print(f"step {seqs:4d} seqs {tokens:5d} tokens: forward {statistics.median(times):7.3f} ms, "
              f"lm_head+sample {head_us / 1e3:.3f} ms; {note}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--no-kernels", action="store_true")
    parser.add_argument("--no-pdl", action="store_true")
    parser.add_argument("--quantization", default="fp8")
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    with torch.inference_mode():
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
        if not options.no_kernels:
            measure(not options.no_pdl)
        if options.steps:
            steps(options.quantization, FP8 if options.quantization == "fp8" else BF16, options.layers)


if __name__ == "__main__":
    main()
