"""Devices: what GPUs can do, as data. Pure, so that every row is tested without its device.

Whatever depends on the hardware is decided by these rows, never by a name: Architecture says what an instruction set
has, Peaks what a product of it reaches. An architecture that is not here is refused: nothing of ours was compiled for
it.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import QuireError

E4M3FN = "float8_e4m3fn"  # largest 448; NVIDIA, AMD from gfx950 on, and checkpoints
E4M3FNUZ = "float8_e4m3fnuz"  # largest 240, one zero, NaN where e4m3fn has -0; AMD's gfx942


@dataclass(frozen=True, slots=True)
class Architecture:
    """One instruction set.

    name: as compilers know it; label: as its vendor speaks of it. fp8: torch's name of the format that it multiplies
    and stores; None: it has no FP8 products. dependent_launches: a kernel may begin while its predecessor ends.
    shared_bytes: on-chip memory that one program may take. wave: threads of a warp. graphs: steps can be captured.
    """

    name: str
    label: str
    fp8: str | None
    dependent_launches: bool
    shared_bytes: int
    wave: int = 32
    graphs: bool = True

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Weights and activations, best first."""
        return ("bfloat16", "float32") if self.shared_bytes >= FLOAT32_BYTES else ("bfloat16",)

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        """Cache storage."""
        plain = ("bfloat16", "float32") if self.shared_bytes >= FLOAT32_CACHE_BYTES else ("bfloat16",)
        return (*plain, "fp8") if self.fp8 is not None else plain

    @property
    def schemes(self) -> tuple[str, ...]:
        """Quantizations of weights."""
        return ("none", "fp8") if self.fp8 is not None else ("none",)


@dataclass(frozen=True, slots=True)
class Peaks:
    """One product, as torch sees it (an MI250 is two devices): dense bfloat16 products and memory, from its data sheet.

    memory_gib tells the products of one architecture apart.
    """

    name: str
    architecture: str
    memory_gib: int
    bf16_tflops: float
    bandwidth_tbps: float

    @property
    def ideal_step_tokens(self) -> int:
        """Where products turn from memory-bound to compute-bound, in whole 16 tokens.

        A bfloat16 weight costs two bytes to read and two operations per token. FP8 halves the bytes and doubles the
        rate, which comes to the same.
        """
        tokens = self.bf16_tflops * ATTAINABLE_RATE / (self.bandwidth_tbps * ATTAINABLE_BANDWIDTH)
        return max(1, round(tokens / STEP)) * STEP


STEP = 16  # rows of a tile
# What of the peaks one H200 reached (tools/plan/gpus.toml); nothing else has been measured.
ATTAINABLE_RATE = 0.719
ATTAINABLE_BANDWIDTH = 0.896
UNKNOWN_STEP_TOKENS = 160  # of products without a row: as on an H200

KIB = 1024
# Shared memory that attention takes at most when compiled for heads of up to 256.
FLOAT32_BYTES = 84160  # in float32
FLOAT32_CACHE_BYTES = 114688  # in bfloat16 over a cache in float32
CUDA = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm_80", "compute capability 8.0", None, False, 163 * KIB),
        Architecture("sm_86", "compute capability 8.6", None, False, 99 * KIB),
        Architecture("sm_89", "compute capability 8.9", E4M3FN, False, 99 * KIB),
        Architecture("sm_90", "compute capability 9.0", E4M3FN, True, 227 * KIB),
        Architecture("sm_100", "compute capability 10.0", E4M3FN, True, 227 * KIB),
        Architecture("sm_120", "compute capability 12.0", E4M3FN, True, 99 * KIB),
    )
}
ROCM = {
    architecture.name: architecture
    for architecture in (
        Architecture("gfx90a", "gfx90a", None, False, 64 * KIB, wave=64),
        Architecture("gfx942", "gfx942", E4M3FNUZ, False, 64 * KIB, wave=64),
    )
}

PRODUCTS = (
    Peaks("A100 40 GB", "sm_80", 40, 312, 1.555),
    Peaks("A100 80 GB", "sm_80", 80, 312, 2.039),
    Peaks("L40S 48 GB", "sm_89", 48, 362.05, 0.864),
    Peaks("H100 80 GB", "sm_90", 80, 989.4, 3.35),
    Peaks("H200 141 GB", "sm_90", 140, 989.4, 4.8),
    Peaks("B200 180 GB", "sm_100", 179, 2250, 7.67),
    Peaks("MI250 128 GB", "gfx90a", 64, 181.05, 1.6384),
    Peaks("MI300X 192 GB", "gfx942", 192, 1307.4, 5.3),
)


def find(table: dict[str, Architecture], name: str, device_name: str) -> Architecture:
    """The row of a device. Raises QuireError invalid_config that names the device and what there is."""
    if name not in table:
        text = f"the kernels are not made for {device_name} ({name}), only for {', '.join(table)}; --device cpu serves"
        raise QuireError("invalid_config", text, "device")
    return table[name]


def ideal_step_tokens(architecture: str, memory_bytes: int) -> int:
    """Of the product whose memory is nearest."""
    rows = [row for row in PRODUCTS if row.architecture == architecture]
    if not rows:
        return UNKNOWN_STEP_TOKENS
    return min(rows, key=lambda row: abs(row.memory_gib - memory_bytes / 2**30)).ideal_step_tokens


def with_fp8() -> str:
    """Names of the products that have FP8 products, for messages."""
    known = CUDA | ROCM
    return ", ".join(row.name.partition(" ")[0] for row in PRODUCTS if known[row.architecture].fp8 is not None)
