"""`quire bench step`: where the time of a decode step goes: host, device, and kernel by kernel. Random weights.

python -m tools.bench step FOLDER --device cuda --quantization fp8 --rows 1,64,256 --context 640
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from core.config import build
from core.messages import Batch, NewSequence, RowBlocks, Scheduled
from core.model_info import resolve
from hw.comm import Comm
from hw.select import select
from models.runtime.build import load_runner
from models.runtime.runner import ModelRunner
from quire import SamplingParams
from tools.bench.report import percentiles, table


def main(argv: list[str] | None = None) -> int:
    """One table of milliseconds per number of rows, and one of kernels for each."""
    parser = argparse.ArgumentParser(prog="quire bench step", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--prefill", type=int, default=0, help="prompt tokens that ride in each step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kernels", type=int, default=14, help="rows of the kernel tables; 0: none")
    arguments = parser.parse_args(argv)
    config = build(
        {
            "model": arguments.folder,
            "device": arguments.device,
            "quantization": arguments.quantization,
            "kv_dtype": arguments.kv_dtype,
            "load_format": "dummy",
            "max_model_len": 2048,
            "max_num_seqs": max(map(int, arguments.rows.split(","))) + 1,
        }
    )
    model = resolve(arguments.folder, weights=False, max_model_len=2048)
    phases: dict[str, float] = {}
    runner = load_runner(config, model, select(arguments.device, 0, Path(config.cache_dir)), Comm(), phases)
    print("start: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items()))
    rows, kernels = [], []
    for text in arguments.rows.split(","):
        steps = Steps(runner, int(text), arguments.context, arguments.prefill)
        steps.run(10)
        rows.append([text, *steps.timed(arguments.steps)])
        if arguments.kernels:
            kernels.append((text, steps.profiled(20, arguments.kernels)))
    print(f"\nms per step, context {arguments.context}, {arguments.prefill} prompt tokens in each, p50\n")
    print(table(["rows", "step", "forward (host)", "sample (host)", "wait", "device"], rows))
    for text, cells in kernels:
        print(f"\n{text} rows, kernels per step\n")
        print(table(["kernel", "calls", "us each", "us per step"], cells))
    return 0


class Steps:
    """Decode steps of `num` rows, as the worker runs them: step N+1 is launched before step N's ids are waited for."""

    def __init__(self, runner: ModelRunner, num: int, context: int, prefill: int) -> None:
        self.runner = runner
        self.num = num
        self.prefill = prefill
        self.position = context
        self.number = 0
        per_row = 2048 // runner.ready(0, "").block_size
        sampling = SamplingParams(temperature=0.0, max_tokens=1000)
        new = [NewSequence(i, 0, [1] * context, [], sampling) for i in range(num)]
        blocks = [RowBlocks(i, 0, 0, list(range(i * per_row, (i + 1) * per_row))) for i in range(num)]
        if prefill:
            new.append(NewSequence(num, 0, [1] * 1024, [], sampling))
            blocks.append(RowBlocks(num, 0, 0, list(range(num * per_row, (num + 1) * per_row))))
        self.first: tuple[list[NewSequence], list[RowBlocks]] | None = (new, blocks)
        self.pending: Any = None

    def batch(self) -> Batch:
        """The next step."""
        self.number += 1
        scheduled = [Scheduled(i, self.position - 1, 1, True) for i in range(self.num)]
        if self.prefill:
            scheduled.append(Scheduled(self.num, 256, self.prefill, False))
        self.position += 1
        new, blocks = self.first or ([], [])
        self.first = None
        return Batch("", self.number, scheduled, new, [], blocks, reset=self.number == 1)

    def run(self, count: int) -> list[tuple[float, float, float, float]]:
        """(step, forward, sample, wait) in seconds."""
        times = []
        for _ in range(count):
            batch = self.batch()
            began = time.perf_counter()
            self.runner.forward(batch)
            forwarded = time.perf_counter()
            pending = self.runner.sample()
            sampled = time.perf_counter()
            if self.pending is not None:
                self.pending.results()
            self.pending = pending
            ended = time.perf_counter()
            times.append((ended - began, forwarded - began, sampled - forwarded, ended - sampled))
        return times

    def timed(self, count: int) -> list[str]:
        """Cells of the table; the device's time is that of steps queued without waiting."""
        times = self.run(count)
        cells = [f"{(percentiles([t[i] for t in times])['p50'] or 0) * 1e3:.2f}" for i in range(4)]
        make: Any = torch.cuda.Event
        start, end = (make(enable_timing=True) for _ in range(2))
        device = []
        for _ in range(10):
            batch = self.batch()
            torch.cuda.synchronize()
            start.record()
            self.runner.forward(batch)
            self.pending = self.runner.sample()
            end.record()
            torch.cuda.synchronize()
            device.append(start.elapsed_time(end))
        return [*cells, f"{sorted(device)[5]:.2f}"]

    def profiled(self, count: int, limit: int) -> list[list[str]]:
        """Kernels by their share of a step."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run(count)
            torch.cuda.synchronize()
        spent: dict[str, list[float]] = defaultdict(list)
        for event in profile.events():
            if str(event.device_type).endswith("CUDA"):
                spent[event.name].append(event.device_time)
        ranked = sorted(spent.items(), key=lambda item: -sum(item[1]))
        total = sum(sum(times) for times in spent.values()) / count
        cells = [
            [name[:60], f"{len(times) / count:.0f}", f"{sum(times) / len(times):.1f}", f"{sum(times) / count:.0f}"]
            for name, times in ranked[:limit]
        ]
        return [*cells, ["all", f"{sum(map(len, spent.values())) / count:.0f}", "", f"{total:.0f}"]]


if __name__ == "__main__":
    sys.exit(main())
