"""`quire bench NAME` / `python -m tools.bench NAME`: one table of measurements."""

from __future__ import annotations

import importlib
import sys

BENCHES = {
    "serve": "load against a running server: throughput and latencies",
    "step": "where the time of a decode step goes: host, device, kernel by kernel",
    "sweep": "start a server, measure it at several concurrencies, stop it",
    "throughput": "tokens per second offline, all prompts at once",
    "latency": "one batch at a time, offline",
    "null": "the whole stack without a model: its ceiling, and the CPU share of each process",
    "scheduler": "cost of a scheduling step at many running sequences",
    "pacing": "pacing policies on a simulated clock, with a model of the step time",
    "startup": "seconds from `quire serve` to the first healthy answer",
    "transformers": "Quire over HTTP against transformers.generate, in one run",
    "parity": "greedy answers to 200 chat prompts against transformers, token by token",
    "kernels": "GPU kernels against their limits",
}


def main(argv: list[str] | None = None) -> int:
    """Run a measurement; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in BENCHES:
        name = {"transformers": "against_transformers"}.get(argv[0], argv[0])
        return int(importlib.import_module(f"tools.bench.{name}").main(argv[1:]) or 0)
    print("usage: quire bench NAME …   (quire bench NAME --help tells more)\n")
    for name, text in BENCHES.items():
        print(f"  {name:<13} {text}")
    return 0 if argv[:1] in ([], ["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main())
