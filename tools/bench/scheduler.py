"""`quire bench scheduler`: what the scheduler costs per step, schedule and update together, without any worker.

A step must cost the same whatever waits, and an arrival too: --waiting 100000 --tenants 1000 shows it.
"""

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
    """Print a table: microseconds per step, median and p99, decoding and with prefill in every step; and of adding a
    request, and of the figures that the heartbeat carries."""
    parser = argparse.ArgumentParser(prog="quire bench scheduler", description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--running", default="8,64,256,1024")
    parser.add_argument("--waiting", type=int, default=0, help="requests that wait all the time")
    parser.add_argument("--tenants", type=int, default=1, help="API keys that they came with, each of ten users")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    arguments = parser.parse_args(argv)
    rows = []
    for text in arguments.running.split(","):
        cells = [text]
        for mixed in (False, True):
            house = House(int(text), mixed, arguments.waiting, arguments.tenants, arguments.prompt_tokens)
            times = [house.step() for _ in range(arguments.steps)]
            cells += [f"{statistics.median(times):,.0f}", f"{sorted(times)[int(0.99 * len(times))]:,.0f}"]
        cells += [f"{statistics.median([house.add(256) for _ in range(1000)]):,.1f}"]
        cells += [f"{statistics.median([house.count() for _ in range(20)]):,.0f}"]
        rows.append(cells)
    print(f"us per step, {arguments.waiting:,} waiting of {arguments.tenants:,} tenants")
    print(f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}\n")
    header = ["running", "decode p50", "decode p99", "mixed p50", "mixed p99", "add p50", "figures"]
    print(table(header, rows))
    return 0


class House:
    """A scheduler with `running` sequences that decode, and `waiting` requests that stay behind them.

    `mixed`: requests end and begin all the time, `prompt_tokens` in and 256 out.
    """

    def __init__(self, running: int, mixed: bool, waiting: int, tenants: int, prompt_tokens: int) -> None:
        self.scheduler = Scheduler(
            Limits(running, max(4096, 2 * running), 8192, 160),
            [KVSpec(32, 65536)],
            [running * 64 + 64],
            16,
            "bench",
            True,
        )
        self._mixed = mixed
        self._tenants = tenants
        self._prompt_tokens = prompt_tokens
        self._rng = random.Random(0)
        self._number = 0
        for _ in range(running + waiting):
            self.add(self._rng.randint(1, 256) if mixed else 8192 - 600)
        while not self._settled(running):
            self.step()
        freeze_heap()

    def add(self, output: int) -> float:
        """Queue a request; returns microseconds."""
        self._number += 1
        prompt = [self._rng.randrange(100_000) for _ in range(self._prompt_tokens)]
        sampling = SamplingParams(max_tokens=output, temperature=0)
        tenant = f"t{self._number % self._tenants}"
        user = f"u{self._number // self._tenants % 10}"
        submit = Submit(f"r{self._number}", "", [TokenSegment(prompt)], sampling, tenant=tenant, user=user)
        began = time.perf_counter()
        self.scheduler.add(submit)
        return (time.perf_counter() - began) * 1e6

    def step(self) -> float:
        """One step and its answer; returns microseconds."""
        began = time.perf_counter()
        batch = self.scheduler.schedule()
        middle = time.perf_counter()
        assert batch is not None
        result = BatchResult("", batch.step, [RowResult(s.row, [7]) for s in batch.scheduled if s.sample])
        again = time.perf_counter()
        outputs = self.scheduler.update(result)
        ended = time.perf_counter()
        if self._mixed:
            for output in outputs:
                if output.finish_reason is not None:
                    self.add(256)
        return (middle - began + ended - again) * 1e6

    def count(self) -> float:
        """What a heartbeat asks for; returns microseconds."""
        began = time.perf_counter()
        self.scheduler.waiting_by()
        return (time.perf_counter() - began) * 1e6

    def _settled(self, running: int) -> bool:
        scheduler = self.scheduler
        if self._mixed and scheduler.counters.output_tokens > 300 * running:
            return True
        return len(scheduler.running) == running and all(
            sequence.num_scheduled >= self._prompt_tokens for sequence in scheduler.running
        )


if __name__ == "__main__":
    sys.exit(main())
