"""`quire bench startup`: seconds from `quire serve` to the first healthy answer, and the phases that it prints."""

from __future__ import annotations

import argparse
import statistics
import sys

from tools.bench.report import table
from tools.bench.server import running


def main(argv: list[str] | None = None) -> int:
    """Start and stop a server several times; unknown options go to `quire serve`."""
    parser = argparse.ArgumentParser(prog="quire bench startup", description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    arguments, options = parser.parse_known_args(argv)
    seconds = []
    lines: list[str] = []
    for _ in range(arguments.runs):
        with running(*options) as server:
            seconds.append(server["start_s"])
            lines = server["lines"]
    print("\n".join(lines) + "\n")
    cells = [f"{value:.1f}" for value in (min(seconds), statistics.median(seconds), max(seconds))]
    print(table(["options", "fastest s", "median s", "slowest s"], [[" ".join(options) or "(none)", *cells]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
