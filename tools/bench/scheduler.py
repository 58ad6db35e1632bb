"""`quire bench scheduler`: what the scheduler costs per step, schedule and update together, without any worker."""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time

from core.messages import BatchResult, KVSpec, RowResult, Submit, TokenSegment
from core.process import freeze_heap
from core.scheduler import Limits, Scheduler
from quire import SamplingParams
from tools.bench.report import table


def main(argv: list[str] | None = None) -> int:
    """Print a table: microseconds per step, median and p99, decoding and with prefill in every step."""
    parser = argparse.ArgumentParser(prog="quire bench scheduler", description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--running", default="8,64,256,1024")
    parser.add_argument("--waiting", type=int, default=0, help="requests that wait all the time")
    arguments = parser.parse_args(argv)
    rows = []
    for text in arguments.running.split(","):
        cells = [text]
        for mixed in (False, True):
            times = measure(int(text), arguments.steps, mixed, arguments.waiting)
            cells += [f"{statistics.median(times):,.0f}", f"{sorted(times)[int(0.99 * len(times))]:,.0f}"]
        rows.append(cells)
    print(
        f"us per step, {arguments.waiting} waiting, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(table(["running", "decode p50", "decode p99", "mixed p50", "mixed p99"], rows))
    return 0


def measure(running: int, steps: int, mixed: bool, waiting: int) -> list[float]:
    """Microseconds of each step. `mixed`: requests end and begin all the time, 512 in and 256 out."""
    rng = random.Random(0)
    scheduler = Scheduler(
        Limits(running, max(4096, 2 * running), 8192, 160), [KVSpec(32, 65536)], [running * 64 + 64], 16, "bench", True
    )
    numbers = iter(range(10**9))

    def add(output: int) -> None:
        prompt = [rng.randrange(100_000) for _ in range(512)]
        sampling = SamplingParams(max_tokens=output, temperature=0)
        scheduler.add(Submit(f"r{next(numbers)}", "", [TokenSegment(prompt)], sampling))

    def step() -> float:
        began = time.perf_counter()
        batch = scheduler.schedule()
        middle = time.perf_counter()
        assert batch is not None
        result = BatchResult("", batch.step, [RowResult(s.row, [7]) for s in batch.scheduled if s.sample])
        again = time.perf_counter()
        outputs = scheduler.update(result)
        ended = time.perf_counter()
        if mixed:
            for output in outputs:
                if output.finish_reason is not None:
                    add(256)
        return (middle - began + ended - again) * 1e6

    for _ in range(running + waiting):
        add(rng.randint(1, 256) if mixed else 8192 - 600)
    while len(scheduler.running) < running or any(s.num_scheduled < 512 for s in scheduler.running):
        step()
        if not mixed and scheduler.num_waiting <= waiting and all(s.num_scheduled >= 512 for s in scheduler.running):
            break
        if mixed and scheduler.counters.output_tokens > 300 * running:
            break
    freeze_heap()
    return [step() for _ in range(steps)]


if __name__ == "__main__":
    sys.exit(main())
