"""`quire bench transformers`: Quire over HTTP against transformers.generate in the same run, on the CPU, float32.

One request at a time, and 16 at a time with mixed output lengths against transformers' static batch of 16, which runs
until its longest member ends. Both compute the same tokens: greedy, end-of-sequence ignored, lengths given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from typing import Any

import torch
import transformers

from core.errors import QuireError
from core.model_info import resolve
from tools.bench.elsewhere import Elsewhere
from tools.bench.load import Load
from tools.bench.report import table
from tools.bench.sender import send
from tools.bench.server import running
from tools.bench.stamp import lines, stamp


def main(argv: list[str] | None = None) -> int:
    """Print one table: tokens/s of both and their ratio."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="quire bench transformers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=12, help="one at a time")
    parser.add_argument("--batches", type=int, default=4, help="static batches of 16")
    parser.add_argument("--rounds", type=int, default=2, help="each round measures both, one after the other")
    parser.add_argument("--stream", action="store_true", help="token by token; generate() gives an answer as a whole")
    options = parser.parse_args(argv)
    stamped = stamp("transformers", argv)
    info = resolve(options.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32).eval()
    alone = Load(
        "http://",
        info.name,
        options.requests,
        1,
        options.prompt_tokens,
        options.output_tokens,
        vocab_size=info.vocab_size,
        stream=options.stream,
    )
    many = dataclasses.replace(alone, num_requests=16 * options.batches, concurrency=16, output_spread=0.9)
    rows = []
    for name, load in (("one at a time", alone), ("16 at a time, mixed lengths", many)):
        rounds = []
        elsewhere = Elsewhere()
        for number in range(options.rounds):
            load = dataclasses.replace(load, seed=number)
            rounds.append((generate_all(model, load), serve_all(options.model, load)))
        theirs, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
        apart = " ".join(f"{b / a:.1f}x" for a, b in rounds)
        cells = [f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.1f}x", apart, f"{elsewhere.share():.0%}"]
        rows.append([name, *cells])
    print(
        f"{lines(stamped)}\n\n{info.name}, float32, {options.prompt_tokens} in, {options.output_tokens} out "
        f"(mixed: 10 % to 190 % of it), greedy, {'streamed' if options.stream else 'whole answers'}; "
        f"{torch.get_num_threads()} threads for transformers; medians of the rounds\n"
    )
    print(table(["load", "transformers tokens/s", "Quire tokens/s", "ratio", "of each round", "used by others"], rows))
    return 0


def serve_all(model: str, load: Load) -> float:
    """Tokens per second of Quire over HTTP, ramp and tail included, as in `generate_all`."""
    with running(model, "--dtype", "float32") as server:
        load = dataclasses.replace(load, url=server["url"])
        send(dataclasses.replace(load, num_requests=2, seed=-1))
        sent = send(load)
    if wrong := [
        answer.error or "length" for answer in sent.answers if answer.output_tokens != load.max_tokens(answer.index)
    ]:
        raise QuireError("engine_failed", f"{len(wrong)} requests failed: {wrong[0]}")
    return sum(answer.output_tokens for answer in sent.answers) / (sent.ended_s - sent.began_s)


def generate_all(model: Any, load: Load) -> float:
    """Useful tokens per second of transformers.generate, in static batches of the load's concurrency."""
    bodies = [json.loads(load.body(index)) for index in range(load.num_requests)]
    random.Random(0).shuffle(bodies)
    step(model, bodies[:1], 8)
    tokens, seconds = 0, 0.0
    for at in range(0, len(bodies), load.concurrency):
        batch = bodies[at : at + load.concurrency]
        longest = max(body["max_tokens"] for body in batch)
        began = time.monotonic()
        step(model, batch, longest)
        seconds += time.monotonic() - began
        tokens += sum(body["max_tokens"] for body in batch)
    return tokens / seconds


@torch.inference_mode()
def step(model: Any, batch: list[dict[str, Any]], num_tokens: int) -> None:
    """One static batch; prompts have equal lengths."""
    ids = torch.tensor([body["prompt"] for body in batch])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )


if __name__ == "__main__":
    sys.exit(main())
