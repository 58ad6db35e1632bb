"""Gpu: one row of gpus.toml, and the rates that can be reached on it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from core.errors import QuireError

PATH = Path(__file__).with_name("gpus.toml")


class Attainable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shares of the peaks that can be reached."""

    bandwidth: float
    bf16: float
    fp8: float
    attention: float


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See gpus.toml for units. `source`: figure -> where it is from."""

    name: str
    memory_mib: int
    bandwidth_tbps: float
    bf16_tflops: float
    link_gbps: float
    served: bool
    source: dict[str, str]
    fp8_tflops: float | None = None
    measured: bool = False
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        """As the driver reports it."""
        return self.memory_mib << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """What one GPU can do at most: bytes/s of memory and link, operations/s of products and of prompt attention."""

    memory: float
    plain_products: float
    fp8_products: float
    attention: float
    link: float


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    attainable: Attainable
    gpus: dict[str, Gpu]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All GPUs by their key, in the file's order."""

    attainable: Attainable
    gpus: dict[str, Gpu]

    @staticmethod
    def read() -> Catalogue:
        """gpus.toml, checked."""
        file = msgspec.convert(tomllib.loads(PATH.read_text()), _File)
        return Catalogue(file.attainable, file.gpus)

    def find(self, key: str) -> Gpu:
        """Raises QuireError invalid_config for an unknown key."""
        gpu = self.gpus.get(key.lower())
        if gpu is None:
            known = ", ".join(self.gpus)
            raise QuireError("invalid_config", f"--gpu: {key!r} is not known; choose of {known}", "gpu")
        return gpu

    def rates(self, gpu: Gpu) -> Rates:
        """The peaks of a GPU, times what can be reached of them."""
        share = self.attainable
        return Rates(
            memory=gpu.bandwidth_tbps * 1e12 * share.bandwidth,
            plain_products=gpu.bf16_tflops * 1e12 * share.bf16,
            fp8_products=(gpu.fp8_tflops or 0.0) * 1e12 * share.fp8,
            attention=gpu.bf16_tflops * 1e12 * share.attention,
            link=gpu.link_gbps * 1e9,
        )
