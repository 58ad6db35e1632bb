"""`quire bench throughput`: tokens per second offline: all prompts at once through quire.LLM, no HTTP.

Unknown options go to the engine, as to `quire serve` (--dtype, --quantization, --max-num-seqs …).
"""

from __future__ import annotations

import argparse
import sys
import time

import quire
from tools.bench.engine_options import engine_options
from tools.bench.load import Load
from tools.bench.report import table
from tools.bench.stamp import lines, stamp


def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="quire bench throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--output-spread", type=float, default=0.0, help="output lengths vary by this share")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options, rest = parser.parse_known_args(argv)
    stamped = stamp("throughput", argv)
    load = Load(
        "http://",
        options.model,
        options.prompts,
        options.prompts,
        options.prompt_tokens,
        options.output_tokens,
        options.output_spread,
        options.vocab_size,
    )
    prompts = [load.prompt(index) for index in range(options.prompts)]
    sampling = [
        quire.SamplingParams(temperature=0, max_tokens=load.max_tokens(index), ignore_eos=True)
        for index in range(options.prompts)
    ]
    with quire.LLM(options.model, **engine_options(rest)) as llm:
        llm.generate([[5, 6, 7]] * 4, quire.SamplingParams(max_tokens=4), progress=False)  # warm
        began = time.monotonic()
        answers = llm.generate(prompts, sampling)
        seconds = time.monotonic() - began
    num_in = sum(answer.prompt_tokens for answer in answers)
    num_out = sum(answer.completion_tokens for answer in answers)
    cells = [f"{len(answers)}", f"{seconds:.2f}", f"{num_in / seconds:,.0f}", f"{num_out / seconds:,.0f}"]
    print(f"{lines(stamped)}\n\n" + table(["prompts", "seconds", "prompt tokens/s", "output tokens/s"], [cells]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
