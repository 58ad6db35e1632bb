"""StepMeter: the engine's measures of time, which the pure scheduler does not take.

A step costs it about a microsecond, and a request three; whatever takes longer is done once a second, in `snapshot`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from core.drain import Drain
from core.messages import Batch, BatchResult, SequenceOutput
from core.scheduler import Scheduler
from core.stats import CountHistogram, EngineSnapshot, Histogram


class Course:
    """When a request went from one phase to the next."""

    __slots__ = ("arrival_s", "first_s", "start_s")

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.start_s = 0.0  # when the first step with it was sent
        self.first_s = 0.0  # when its first token came


class StepMeter:
    """Counts steps and endings, and times the phases of requests; makes the engine's snapshot.

    The device's idle time is what passed between two answers and was not the later step's own work, as far as there was
    work: from the first request's arrival after a rest on.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.busy_s = 0.0
        self.idle_s = 0.0
        self.step = Histogram()
        self.prefill_step = Histogram()
        self.tokens_per_step = CountHistogram()
        self.rows_per_step = CountHistogram()
        self.queue = Histogram()
        self.prefill = Histogram()
        self.decode = Histogram()
        self.worker_restarts = 0
        self.refused: dict[str, int] = {}
        self.expired: dict[str, int] = {"waiting": 0, "running": 0}
        self.drain = Drain()
        self._courses: dict[str, Course] = {}
        self._sent: dict[int, tuple[float, bool]] = {}  # step -> (sent_s, whether it computes a piece of a prompt)
        self._step_tokens = 0
        self._idle_from_s = 0.0  # since when the device could have been at work; 0: it has nothing to do

    def admitted(self, request_id: str, arrival_s: float, after_rest: bool) -> None:
        """A request was queued. `arrival_s`: when the server took it (0: unknown). `after_rest`: it is the only one."""
        now = time.monotonic()
        self._courses[request_id] = Course(arrival_s or now)
        if after_rest:
            self._idle_from_s = now

    def sent(self, batch: Batch, step_tokens: int, new_ids: Iterable[str]) -> None:
        """A step was sent. `step_tokens`: the positions of all steps so far; `new_ids`: requests that begin in it."""
        num_tokens, self._step_tokens = step_tokens - self._step_tokens, step_tokens
        num_rows = len(batch.scheduled)
        self.tokens_per_step.observe(num_tokens)
        self.rows_per_step.observe(num_rows)
        self._sent[batch.step] = (batch.sent_s, num_tokens > num_rows)
        for request_id in new_ids:
            course = self._courses.get(request_id)
            if course is not None and not course.start_s:
                course.start_s = batch.sent_s
                self.queue.observe(batch.sent_s - course.arrival_s)

    def observe(self, result: BatchResult, outputs: list[SequenceOutput], scheduler: Scheduler) -> dict[str, float]:
        """Note an answered step; returns the seconds in the queue of each request whose first token it brought."""
        now = time.monotonic()
        sent_s, has_prompt = self._sent.pop(result.step, (now, False))
        self.steps += 1
        self.busy_s += result.busy_s
        self.step.observe(now - sent_s)
        if has_prompt:
            self.prefill_step.observe(now - sent_s)
        done_s = result.done_s or now
        if self._idle_from_s:
            self.idle_s += max(0.0, done_s - self._idle_from_s - result.busy_s)
        first_ids: list[str] = []
        ended_ids: list[str] = []
        for output in outputs:
            if output.finish_reason is not None:
                ended_ids.append(output.request_id)
            if output.first == 0 and output.token_ids:
                first_ids.append(output.request_id)
        queued_s = {request_id: self._first(request_id, now) for request_id in first_ids} if first_ids else {}
        for request_id in ended_ids:
            if not scheduler.has(request_id):
                self.ended(request_id)
        self._idle_from_s = done_s if scheduler.requests else 0.0
        counters = scheduler.counters
        self.drain.observe(now, counters.dequeued, counters.dequeued_tokens, scheduler.num_waiting > 0)
        return queued_s

    def _first(self, request_id: str, now: float) -> float:
        """A choice has its first token; the request's first one counts. Returns its seconds in the queue."""
        course = self._courses.get(request_id)
        if course is None or not course.start_s:
            return 0.0
        if not course.first_s:
            course.first_s = now
            self.prefill.observe(now - course.start_s)
        return course.start_s - course.arrival_s

    def ended(self, request_id: str) -> None:
        """A request is over by its own rules."""
        course = self._courses.pop(request_id, None)
        if course is not None and course.first_s:
            self.decode.observe(time.monotonic() - course.first_s)

    def dropped(self, request_id: str) -> None:
        """A request was aborted: its phases are nobody's measure."""
        self._courses.pop(request_id, None)

    def restarted(self, has_work: bool) -> None:
        """The steps in flight are lost; the time that the workers were away is no idle time."""
        self._sent.clear()
        self._idle_from_s = time.monotonic() if has_work else 0.0

    def refuse(self, bound: str) -> None:
        """A request was refused because the queue is full; `bound`: which of its bounds was reached."""
        self.refused[bound] = self.refused.get(bound, 0) + 1

    def snapshot(self, scheduler: Scheduler) -> EngineSnapshot:
        """The engine's figures at this moment."""
        pools = scheduler.groups.pools
        counters = scheduler.counters
        return EngineSnapshot(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            waiting_by=scheduler.waiting_by(),
            queued_tokens=scheduler.queued_tokens,
            refused=self.refused,
            expired=self.expired,
            kv_blocks_total=sum(pool.num_blocks for pool in pools),
            kv_blocks_used=sum(pool.num_blocks - pool.num_free for pool in pools),
            kv_blocks_cached=sum(pool.num_cached for pool in pools),
            steps=self.steps,
            step_tokens=counters.step_tokens,
            busy_s=self.busy_s,
            idle_s=self.idle_s,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            output_tokens=counters.output_tokens,
            preemptions=counters.preemptions,
            recomputed_tokens=counters.recomputed_tokens,
            requests=counters.requests,
            aborted=counters.aborted,
            worker_restarts=self.worker_restarts,
            step=self.step,
            prefill_step=self.prefill_step,
            tokens_per_step=self.tokens_per_step,
            rows_per_step=self.rows_per_step,
            queue=self.queue,
            prefill=self.prefill,
            decode=self.decode,
        )
