"""`quire bench null`: the whole stack without a model: the ceiling that HTTP, tokenizer and scheduler set.

Two tables: long answers (tokens/s) and answers of one token (requests/s), each at several numbers of streams, with
the CPU share of each process, the load generator's own included: on a small machine it takes its part of the cores.
Unknown options go to `quire serve` (--api-workers 2, --null-step-ms 5 …).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from tools.bench.elsewhere import Elsewhere
from tools.bench.load import Load
from tools.bench.report import HEADER, notes, row, table
from tools.bench.sender import send
from tools.bench.serve import measure, shares_table
from tools.bench.server import running
from tools.bench.stamp import lines, stamp

_MIN_TOKENS = 16_384
_ANSWERS = ((256, "long answers"), (1, "answers of one token"))


def main(argv: list[str] | None = None) -> int:
    """Start a server on the null device and print both tables. 1 when a request failed."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="quire bench null", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", default="1,64,512", help="streams at once, a list (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--waves", type=int, default=6, help="requests per stream; the first and last are dropped")
    parser.add_argument("--clients", type=int, default=1, help="client processes")
    options, server_options = parser.parse_known_args(argv)
    streams = [int(text) for text in options.streams.split(",")]
    stamped = stamp("null", argv)
    seats = () if "--max-num-seqs" in server_options else ("--max-num-seqs", str(max(streams)))
    failed = False
    elsewhere = Elsewhere()
    with running("--device", "null", *seats, *server_options) as server:
        print(lines(stamped))
        for output_tokens, name in _ANSWERS:
            results = []
            for count in streams:
                # A few streams end their waves too soon to be timed.
                waves = max(options.waves, _MIN_TOKENS // (count * max(64, output_tokens)))
                load = Load(
                    url=server["url"],
                    model=server["model"],
                    num_requests=waves * count,
                    concurrency=count,
                    prompt_tokens=options.prompt_tokens,
                    output_tokens=output_tokens,
                    seed=1_000 * output_tokens + count,
                    clients=min(options.clients, count),
                )
                send(dataclasses.replace(load, num_requests=4, concurrency=1, clients=1, seed=-1))
                results.append(measure(load))
            failed |= any(result["errors"] for result in results)
            print(f"\n{name}: {options.prompt_tokens} in, {output_tokens} out\n")
            print(table(HEADER, [row(result) for result in results]))
            print("\nCPU share of each process (100 %: one core)\n\n" + shares_table(results))
            for note in notes(results):
                print(f"\nNote: {note}.")
    print(f"\nOther processes used {elsewhere.share():.0%} of the machine meanwhile.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
