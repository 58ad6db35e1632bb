"""`quire bench latency`: one batch at a time through quire.LLM, no HTTP: how long until all of it has ended.

Next to it the time to the first token, from batches that ask for one token only.
Unknown options go to the engine, as to `quire serve` (--dtype, --quantization …).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import quire
from tools.bench.engine_options import engine_options
from tools.bench.load import Load
from tools.bench.report import percentiles, table
from tools.bench.stamp import lines, stamp


def main(argv: list[str] | None = None) -> int:
    """Print one table, a row per batch size."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="quire bench latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--batch", default="1,8", help="prompts in a batch, a list (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=10, help="batches of each size, after one that is not counted")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=4096)
    options, rest = parser.parse_known_args(argv)
    stamped = stamp("latency", argv)
    rows = []
    with quire.LLM(options.model, **engine_options(rest)) as llm:
        for size in (int(text) for text in options.batch.split(",")):
            load = Load(
                "http://",
                options.model,
                size,
                size,
                options.prompt_tokens,
                options.output_tokens,
                vocab_size=options.vocab_size,
                seed=size,
            )
            whole, first = (percentiles(seconds) for seconds in _measure(llm, load, options.runs))
            step_ms = (_ms(whole["p50"]) - _ms(first["p50"])) / max(1, options.output_tokens - 1)
            cells = [f"{_ms(values[key]):,.1f}" for values in (first, whole) for key in ("p50", "p90")]
            rows.append([str(size), *cells, f"{step_ms:.2f}"])
    print(
        f"{lines(stamped)}\n\n"
        + table(["batch", "first token p50 ms", "p90 ms", "whole batch p50 ms", "p90 ms", "ms per further token"], rows)
    )
    return 0


def _measure(llm: quire.LLM, load: Load, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of whole batches, and of batches of one output token; every batch has fresh prompts."""
    taken: tuple[list[float], list[float]] = ([], [])
    for run in range(runs + 1):
        for column, num_tokens in enumerate((load.output_tokens, 1)):
            fresh = dataclasses.replace(load, seed=1000 * load.seed + 2 * run + column)
            prompts = [fresh.prompt(index) for index in range(load.num_requests)]
            sampling = quire.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            began = time.monotonic()
            llm.generate(prompts, sampling, progress=False)
            if run:
                taken[column].append(time.monotonic() - began)
    return taken


def _ms(seconds: float | None) -> float:
    return (seconds or 0.0) * 1000


if __name__ == "__main__":
    sys.exit(main())
