"""Plot: throughput against latency as a picture."""

from __future__ import annotations

import importlib.util
from typing import Any

from core.errors import QuireError


def require_matplotlib() -> None:
    """Say before a measurement, not after it, that it could not be drawn. Raises QuireError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise QuireError("invalid_config", "--plot: needs matplotlib; pip install matplotlib", "plot")


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Draw output tokens/s against the median time per output token, one labelled point per result, into `path`."""
    import matplotlib.pyplot as plt  # optional, and slow to import: only --plot needs it

    figure, axes = plt.subplots(figsize=(6, 4))
    points = [
        (result["tpot_s"]["p50"] * 1000, result["output_tokens_per_s"], result["rate"] or result["concurrency"])
        for result in results
        if result["tpot_s"]["p50"] is not None
    ]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
    for x, y, label in points:
        axes.annotate(str(label), (x, y), textcoords="offset points", xytext=(4, 4))
    axes.set_xlabel("median time per output token, ms")
    axes.set_ylabel("output tokens/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
