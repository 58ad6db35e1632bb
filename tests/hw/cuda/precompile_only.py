"""Compiles a small model ahead, then runs all of its launches with real tensors, layers and keys, on a device that need
not be there; prints as JSON what was compiled, and what the launches then missed or did not want.

Usage: precompile_only.py ARCHITECTURE CACHE_FOLDER MODEL_FOLDER QUANTIZATION KV_DTYPE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from msgspec.structs import replace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from core.config import Config
from core.messages import Batch, NewSequence, Scheduled
from core.model_info import resolve
from hw.devices import CUDA, ROCM

if sys.argv[1] in ROCM:
    torch.version.hip = "6"  # before hw.cuda.target reads it

from hw.backend import Capabilities
from hw.comm import Comm
from hw.cpu.backend import Copied
from hw.cuda.backend import CudaBackend, settle_cache_keys
from hw.cuda.ops import CudaOps
from hw.cuda.precompile import NoCuda, NoDriver, Precompile, start
from models.runtime import build
from quire import SamplingParams

ARCHITECTURE = (CUDA | ROCM)[sys.argv[1]]
PDL = ARCHITECTURE.dependent_launches
if ARCHITECTURE.name in CUDA:
    TARGET = GPUTarget("cuda", int(ARCHITECTURE.name.removeprefix("sm_")), ARCHITECTURE.wave)
else:
    TARGET = GPUTarget("hip", ARCHITECTURE.name, ARCHITECTURE.wave)
SEQS = 40
CAPABILITIES = Capabilities.of_gpu("here", ARCHITECTURE, "none", 1 << 37)


class Device(CudaBackend):
    """CUDA's backend with its tensors in memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.capabilities = CAPABILITIES

    def free_bytes(self) -> int:
        return 1 << 30

    def to_host(self, tensor: torch.Tensor) -> Any:
        return Copied(tensor)

    def precompile(self, trace: Any, rank: int, ranks: int) -> Precompile:
        return start(trace, CAPABILITIES, TARGET, PDL, Comm(rank, ranks))


def main() -> None:
    cache, folder, *precision = sys.argv[2:]
    quantization: Any = precision[0]
    kv_dtype: Any = precision[1]
    triton.knobs.cache.dir = cache
    settle_cache_keys()
    config = Config(
        max_num_seqs=SEQS, max_step_tokens=96, num_kv_blocks=8, quantization=quantization, kv_dtype=kv_dtype,
        load_format="dummy",
    )  # fmt: skip
    model = replace(resolve("tiny-chat", max_model_len=1000), path=folder, vocab_size=512)
    device = Device()
    compiling = build.begin_compiling(config, model, device, 0)
    assert isinstance(compiling, Precompile)
    counts = compiling.wait()

    hashes: dict[bool, set[str]] = {True: set(), False: set()}
    run = JITFunction.run

    def listen(metadata: Any, cache_hit: bool, **_: Any) -> None:
        hashes[cache_hit].add(f"{metadata['name']} {metadata['hash']}")

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    triton.knobs.compilation.listener = listen
    JITFunction.run = compile_only
    driver.set_active(NoDriver(TARGET))
    setattr(torch, "cuda", NoCuda())  # noqa: B010
    torch._scaled_mm = lambda x, w, out_dtype, **_: torch.empty(x.shape[0], w.shape[1], dtype=out_dtype)
    device.ops = CudaOps(device.device, pdl=PDL)
    runner = build.load_runner(config, model, device, Comm())
    for temperature in (0.0, 0.7):
        sampling = SamplingParams(temperature=temperature)
        new = [NewSequence(row, 0, [1], [], sampling) for row in range(SEQS)]
        for count in range(1, SEQS + 1):
            runner.forward(Batch("", 0, [Scheduled(row, 0, 1, sample=True) for row in range(count)], new))
            runner.sample()
    made = {json.loads(path.read_text())["hash"] for path in Path(cache).glob("*/*_kernel.json")
            if not path.name.startswith("__grp__")}  # fmt: skip
    wanted = {line.split()[1] for kind in hashes.values() for line in kind}
    print(json.dumps({"counts": counts, "missed": sorted(hashes[False]), "superfluous": sorted(made - wanted),
                      "wanted": sorted(hashes[True])}))  # fmt: skip


main()
