"""StepMeter: the engine's measures of time, which the pure scheduler does not take."""

from __future__ import annotations

import time
from collections import deque

from core.messages import BatchResult, SequenceOutput
from core.scheduler import Scheduler
from core.stats import EngineSnapshot, Histogram

WINDOW = 256  # endings that the drain rate is measured over


class StepMeter:
    """Counts steps and endings; makes the engine's snapshot."""

    def __init__(self) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.step = Histogram()
        self.worker_restarts = 0
        self._endings: deque[float] = deque(maxlen=WINDOW)

    def observe(self, result: BatchResult, sent_s: float, outputs: list[SequenceOutput]) -> None:
        """Note an answered step."""
        now = time.monotonic()
        self.steps += 1
        self.busy_s += result.busy_s
        self.step.observe(now - sent_s)
        for output in outputs:
            if output.finish_reason is not None:
                self._endings.append(now)

    def drain_s(self, num_waiting: int) -> float:
        """Seconds until a queue of `num_waiting` drains at the rate of the last endings; between 1 and 60."""
        if len(self._endings) < 2:
            return 1.0
        rate = (len(self._endings) - 1) / max(1e-3, time.monotonic() - self._endings[0])
        return min(60.0, max(1.0, num_waiting / rate))

    def snapshot(self, scheduler: Scheduler) -> EngineSnapshot:
        """The engine's figures at this moment."""
        pools = scheduler.groups.pools
        counters = scheduler.counters
        return EngineSnapshot(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            kv_blocks_total=sum(pool.num_blocks for pool in pools),
            kv_blocks_used=sum(pool.num_blocks - pool.num_free for pool in pools),
            kv_blocks_cached=sum(pool.num_cached for pool in pools),
            steps=self.steps,
            step_tokens=counters.step_tokens,
            busy_s=self.busy_s,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            output_tokens=counters.output_tokens,
            preemptions=counters.preemptions,
            recomputed_tokens=counters.recomputed_tokens,
            requests=counters.requests,
            aborted=counters.aborted,
            worker_restarts=self.worker_restarts,
            step=self.step,
        )
