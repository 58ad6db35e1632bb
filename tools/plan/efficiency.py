"""Efficiency: what of the limit Quire reaches, fitted on one half of measured.toml and judged on the other.

`python -m tools.plan.efficiency` prints both. The model of a step, with three numbers that are fitted:

    decode at its limit  +  kv * cache at its limit  +  prompt * prompts at their limit  +  layer_s * layers

Prompts count in full, since measured steps do not hide them behind the weights' streaming as the limit does. Work
cannot be faster than its limit: kv and prompt are at least 1. The time to the first token, with two more numbers:

    alone * (one prompt and one step)  +  burst * (prompts of half of the other sequences)

as the sequences of a closed loop tend to end, and so to begin, together.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tools.plan.gpus import Catalogue
from tools.plan.limit import Limit, Load, limit_of
from tools.plan.model import KVStored, PlannedModel, Share

PATH = Path(__file__).with_name("measured.toml")
# Seconds of one collective of a few KB, whatever its size: 15 to 25 us are published for NCCL over NVLink. Not
# measured with Quire; the fit is of single GPUs.
COLLECTIVE_S = 20e-6


@dataclass(frozen=True, slots=True)
class Point:
    """A measured load. step_s: per output token of each sequence, first tokens included."""

    name: str
    load: Load
    limit: Limit
    layers: int
    step_s: float
    ttft_s: float
    fit: bool


@dataclass(frozen=True, slots=True)
class Errors:
    """Shares of the measured value, mean and largest."""

    mean: float
    largest: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    """The fitted numbers; see the module."""

    kv: float
    prompt: float
    layer_s: float
    alone: float
    burst: float

    @staticmethod
    def fit(points: Sequence[Point]) -> Efficiency:
        """Least squares of the relative errors."""
        limits = [point.limit for point in points]
        kv, prompt, layer = _at_least_zero(
            [point.step_s for point in points],
            [
                limit.decode + limit.kv + _prompts(limit, point.load)
                for limit, point in zip(limits, points, strict=True)
            ],
            [
                [limit.kv, _prompts(limit, point.load), float(point.layers)]
                for limit, point in zip(limits, points, strict=True)
            ],
        )
        steps = Efficiency(1 + kv, 1 + prompt, layer, 1.0, 0.0)
        alone, burst = _at_least_zero(
            [point.ttft_s for point in points],
            [0.0] * len(points),
            [[steps.ttft_alone_s(point.limit, point.layers), steps._half(point.limit, point.load)] for point in points],
        )
        return Efficiency(1 + kv, 1 + prompt, layer, alone, burst)

    def step_s(self, limit: Limit, load: Load, layers: int, ranks: int = 1) -> float:
        """Expected seconds per step of the steady state."""
        work = limit.decode + self.kv * limit.kv + self.prompt * _prompts(limit, load)
        return work + self._fixed_s(layers, ranks) + limit.link

    def ttft_alone_s(self, limit: Limit, layers: int, ranks: int = 1) -> float:
        """Expected seconds to the first token on an idle server."""
        return self.alone * (self.prompt * limit.prompt + self._fixed_s(layers, ranks))

    def ttft_s(self, limit: Limit, load: Load, layers: int, ranks: int = 1) -> float:
        """Expected median under the load."""
        return self.ttft_alone_s(limit, layers, ranks) + self.burst * self._half(limit, load)

    def _half(self, limit: Limit, load: Load) -> float:
        return (load.concurrency - 1) / 2 * self.prompt * limit.prompt

    def _fixed_s(self, layers: int, ranks: int) -> float:
        collectives = 2 * layers + 2 if ranks > 1 else 0
        return self.layer_s * layers + COLLECTIVE_S * collectives

    def step_errors(self, points: Sequence[Point]) -> list[float]:
        """Expected / measured tokens/s - 1."""
        return [point.step_s / self.step_s(point.limit, point.load, point.layers) - 1 for point in points]

    def ttft_errors(self, points: Sequence[Point]) -> list[float]:
        """Expected / measured - 1."""
        return [self.ttft_s(point.limit, point.load, point.layers) / point.ttft_s - 1 for point in points]


def summary(errors: Sequence[float]) -> Errors:
    """Of signed errors."""
    sizes = [abs(error) for error in errors]
    return Errors(sum(sizes) / len(sizes), max(sizes))


def _prompts(limit: Limit, load: Load) -> float:
    """Seconds of prompts in a step, each on its own."""
    return limit.prompt * load.concurrency / load.output_tokens


def _at_least_zero(measured: list[float], known: list[float], columns: list[list[float]]) -> list[float]:
    """x >= 0 that makes known + columns @ x closest to `measured`, in relative terms."""
    scale = np.array(measured)
    target = 1 - np.array(known) / scale
    matrix = np.array(columns) / scale[:, None]
    kept = list(range(matrix.shape[1]))
    while kept:
        found = np.linalg.lstsq(matrix[:, kept], target, rcond=None)[0]
        if found.min() >= 0:
            break
        del kept[int(found.argmin())]
    return [float(found[kept.index(column)]) if column in kept else 0.0 for column in range(matrix.shape[1])]


@dataclass(frozen=True, slots=True)
class Measured:
    """measured.toml with the limit of every load. stack_tokens_per_s: everything but the model, on two cores."""

    date: str
    gpu: str
    stack_tokens_per_s: float
    points: list[Point]

    @staticmethod
    def read(catalogue: Catalogue) -> Measured:
        """The file, in its order."""
        file = tomllib.loads(PATH.read_text())
        rates = catalogue.rates(catalogue.find(file["gpu"]))
        points = []
        for group in file["loads"]:
            values: dict[str, Any] = file["models"][group["model"]]
            model = PlannedModel.from_values(group["model"], values, values["max_position_embeddings"])
            share = Share.build(model, 1, group["quantization"], KVStored[group["kv_dtype"]])
            for row in group["rows"]:
                cells = dict(zip(group["columns"], row, strict=True))
                load = Load(cells["concurrency"], file["prompt_tokens"], file["output_tokens"])
                ttft_s, tpot_s = cells["ttft_ms"] / 1000, cells["tpot_ms"] / 1000
                points.append(
                    Point(
                        name=f"{group['model']} {group['quantization']}",
                        load=load,
                        limit=limit_of(share, rates, load),
                        layers=model.config.num_layers,
                        step_s=(ttft_s + (load.output_tokens - 1) * tpot_s) / load.output_tokens,
                        ttft_s=ttft_s,
                        fit=cells["fit"],
                    )
                )
        return Measured(file["date"], file["gpu"], file["stack_tokens_per_s"], points)

    def half(self, fit: bool) -> list[Point]:
        """The half that is fitted, or the one that judges."""
        return [point for point in self.points if point.fit == fit]


def main() -> int:
    """Print the fit and its errors."""
    measured = Measured.read(Catalogue.read())
    efficiency = Efficiency.fit(measured.half(True))
    table = Table(title=f"Efficiency on one {measured.gpu}, measured on {measured.date}")
    for name in (
        "load",
        "C",
        "half",
        "limit",
        "measured",
        "expected",
        "error",
        "of limit",
        "TTFT ms",
        "expected",
        "error",
    ):
        table.add_column(name, justify="left" if name in ("load", "half") else "right")
    for point, wrong, late in zip(
        measured.points,
        efficiency.step_errors(measured.points),
        efficiency.ttft_errors(measured.points),
        strict=True,
    ):
        rate = point.load.concurrency / point.step_s
        limit = point.load.concurrency / point.limit.step
        table.add_row(
            point.name,
            str(point.load.concurrency),
            "fit" if point.fit else "held out",
            f"{limit:,.0f}",
            f"{rate:,.0f}",
            f"{rate * (1 + wrong):,.0f}",
            f"{wrong:+.0%}",
            f"{rate / limit:.0%}",
            f"{point.ttft_s * 1000:,.0f}",
            f"{point.ttft_s * 1000 * (1 + late):,.0f}",
            f"{late:+.0%}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"kv {efficiency.kv:.2f}, prompt {efficiency.prompt:.2f}, {efficiency.layer_s * 1e6:.1f} us a layer; "
        f"TTFT: alone {efficiency.alone:.2f}, burst {efficiency.burst:.2f}"
    )
    for name, half in (("fitted", True), ("held out", False)):
        points = measured.half(half)
        rate_errors, ttft_errors = summary(efficiency.step_errors(points)), summary(efficiency.ttft_errors(points))
        console.print(
            f"{name:8}: tokens/s {rate_errors.mean:.0%} mean error, {rate_errors.largest:.0%} at most; "
            f"TTFT {ttft_errors.mean:.0%}, {ttft_errors.largest:.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
