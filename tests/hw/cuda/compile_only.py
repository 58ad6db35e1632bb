"""Compiles every kernel as its launcher would call it, for a GPU that need not be there; prints a JSON list of facts.

Usage: compile_only.py ARCHITECTURE, one of hw/devices.py. A program of its own, since the driver and the interpreter
are chosen per process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hw.devices import CUDA, ROCM

DEVICE = (CUDA | ROCM)[sys.argv[1]]
if DEVICE.name in CUDA:
    TARGET = GPUTarget("cuda", int(DEVICE.name.removeprefix("sm_")), DEVICE.wave)
else:
    TARGET = GPUTarget("hip", DEVICE.name, DEVICE.wave)
    torch.version.hip = "6"  # before hw.cuda.target reads it
COMPILED: list[tuple[str, Any]] = []


class NoDriver:
    """A driver without a device: enough to compile for one."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


driver.set_active(NoDriver())
run = JITFunction.run


def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    COMPILED.append((self.__name__, kernel))
    return kernel


JITFunction.run = compile_instead

from hw.cuda.add_rms_norm import add_rms_norm  # noqa: E402
from hw.cuda.attention_decode import attention_decode  # noqa: E402
from hw.cuda.attention_finish import attention_finish  # noqa: E402
from hw.cuda.attention_prefill import attention_prefill  # noqa: E402
from hw.cuda.embed import embed  # noqa: E402
from hw.cuda.fp8_linear import fp8_linear  # noqa: E402
from hw.cuda.product import Fp8, Product, finish  # noqa: E402
from hw.cuda.rope_cache import rope_cache  # noqa: E402
from hw.cuda.sample import sample  # noqa: E402
from hw.cuda.silu_mul import silu_mul  # noqa: E402
from hw.cuda.target import FP8  # noqa: E402

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
PDL, HAS_FP8 = DEVICE.dependent_launches, DEVICE.fp8 is not None


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(tokens: int, width: int, splits: int) -> Product:
    values = empty(F32 if splits > 1 else BF16, splits, tokens, width)
    return Product(values, BF16, empty(F32, tokens), empty(F32, width))


def compile_all() -> None:
    for splits in (1, 2, 4):
        add_rms_norm(product(16, 4096, splits), empty(BF16, 16, 4096), empty(BF16, 4096), 1e-5, fp8=HAS_FP8, pdl=PDL)
    add_rms_norm(empty(BF16, 16, 8192), empty(BF16, 16, 8192), empty(BF16, 8192), 1e-5, fp8=False, pdl=PDL)
    finish(product(16, 4096, 2), pdl=PDL)
    embed(empty(I32, 16), empty(BF16, 1024, 4096))
    for width in (14336, 28672):
        for tokens in (16, 64, 1024):
            silu_mul(product(tokens, 2 * width, 1), fp8=HAS_FP8, pdl=PDL)
        silu_mul(empty(BF16, 16, 2 * width), fp8=False, pdl=PDL)
    sample(empty(F32, 16, 128256), empty(F32, 16), empty(I32, 16), empty(I32, 16))
    for tokens in (1, 32) if HAS_FP8 else ():
        for num_out in (4096, 28672):
            x = Fp8(empty(FP8, tokens, 4096), empty(F32, tokens))
            fp8_linear(x, empty(FP8, num_out, 4096), empty(F32, num_out), None, BF16, empty(F32), pdl=PDL)
        x = Fp8(empty(FP8, tokens, 14336), empty(F32, 56, tokens))
        fp8_linear(x, empty(FP8, 4096, 14336), empty(F32, 4096), None, BF16, empty(F32), pdl=PDL)
    for store in (BF16, FP8) if HAS_FP8 else (BF16,):
        for dim in (64, 96, 128, 256):
            heads, kv_heads, seqs = 32, 8, 64
            cache = empty(store, 100, kv_heads, 32, dim)
            scale = empty(F32) if store is FP8 else None
            v_cache = empty(store, 100, kv_heads, dim, 32) if store is FP8 else cache
            for tokens in (512, 128):
                rope_cache(
                    product(tokens, (heads + 2 * kv_heads) * dim, 2), heads, kv_heads, dim,
                    empty(F32, 4096, 2, dim // 2),
                    empty(I32, tokens), empty(I32, tokens), cache, v_cache, k_scale=scale, v_scale=scale, pdl=PDL,
                )  # fmt: skip
            q = empty(BF16, tokens, heads, dim)
            shared = (q, cache, v_cache, empty(I32, 64, 256), empty(I32, seqs), empty(I32, seqs + 1), empty(I32, seqs),
                      0.1, None)  # fmt: skip
            attention_prefill(*shared, out=q, k_scale=scale, v_scale=scale)
            long = empty(BF16, 1024, heads, dim)
            attention_prefill(long, *shared[1:], out=long, k_scale=scale, v_scale=scale)
            attention_decode(*shared, k_scale=scale, v_scale=scale, late=True, pdl=PDL)
            parts = attention_decode(*shared, k_scale=scale, v_scale=scale, pdl=PDL)
            attention_finish(parts, empty(I32, seqs + 1), empty(I32, seqs), q, fp8=store is FP8, pdl=PDL)


def facts(name: str, kernel: Any) -> dict[str, Any]:
    names = kernel.src.fn.arg_names
    common = {"name": name, "shared": kernel.metadata.shared, "constants": {
        names[at]: str(value) for (at, *_), value in kernel.src.constants.items() if names[at].isupper()}}  # fmt: skip
    if TARGET.backend == "hip":
        asm = kernel.asm["amdgcn"]
        spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", asm)]
        return common | {"spills": max(spills), "matrix": asm.count("v_mfma"), "fp8_matrix": asm.count("_fp8_fp8")}
    ptx = kernel.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return common | {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": int(re.findall(r"LOCAL:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "fp8_wgmma": len(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "fp8_mma": len(re.findall(r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3", ptx)),
        "tcgen05": ptx.count("tcgen05.mma"),
        "fp8_tcgen05": ptx.count("tcgen05.mma.cta_group::1.kind::f8f6f4"),
        "async_copies": ptx.count("cp.async.cg"),
        "pdl": ptx.count("griddepcontrol"),
    }


compile_all()
print(json.dumps([facts(name, kernel) for name, kernel in COMPILED]))
