"""`quire bench transformers`: Quire over HTTP against transformers.generate in the same run, on the CPU, float32.

One request at a time, and 16 at a time with mixed output lengths against transformers' static batch of 16, which runs
until its longest member ends. Both compute the same tokens: greedy, end-of-sequence ignored, lengths given.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from typing import Any

import psutil
import torch
import transformers

from core.model_info import resolve
from tools.bench.load import Load, run
from tools.bench.report import table
from tools.bench.server import running


def main(argv: list[str] | None = None) -> int:
    """Print one table: tokens/s of both and their ratio."""
    parser = argparse.ArgumentParser(prog="quire bench transformers", description=__doc__)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=12, help="one at a time")
    parser.add_argument("--batches", type=int, default=6, help="static batches of 16")
    arguments = parser.parse_args(argv)
    info = resolve(arguments.model)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(info.path, dtype=torch.float32).eval()
    rows = []
    alone = Load("", info.name, arguments.requests, 1, arguments.prompt_tokens, arguments.output_tokens, seed=1)
    many = Load(
        "", info.name, 16 * arguments.batches, 16, arguments.prompt_tokens, arguments.output_tokens, 0.9, seed=2
    )
    for name, load in (("one at a time", alone), ("16 at a time, mixed lengths", many)):
        theirs = generate_all(model, load)
        with running(arguments.model, "--dtype", "float32") as server:
            served = Load(**{**{f: getattr(load, f) for f in load.__dataclass_fields__}, "url": server["url"]})
            run(Load(**{**{f: getattr(served, f) for f in served.__dataclass_fields__}, "num_requests": 2, "seed": 9}))
            answers, began, ended = run(served)
        assert not any(answer.error for answer in answers), [answer.error for answer in answers]
        ours = sum(answer.output_tokens for answer in answers) / (ended - began)
        rows.append([name, f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.1f}x"])
    print(
        f"{info.name}, float32, {arguments.prompt_tokens} in, {arguments.output_tokens} out "
        f"(mixed: 10 % to 190 % of it), transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{psutil.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(table(["load", "transformers tokens/s", "Quire tokens/s", "ratio"], rows))
    return 0


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
