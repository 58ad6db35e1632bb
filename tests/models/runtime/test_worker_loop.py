"""The worker's loop around a device that computes while the loop goes on: it never waits when it could launch."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from core.messages import Batch, BatchResult, RowResult, Scheduled, Shutdown
from models.runtime.worker import Worker


class Step:
    """A step that is over when the test says so; taking its results earlier would block the loop."""

    due_s = busy_s = 0.0

    def __init__(self, number: int, over: set[int]) -> None:
        self.number = number
        self._over = over

    def done(self) -> bool:
        return self.number in self._over

    def results(self) -> list[RowResult]:
        assert self.done(), "the loop waits for a step"
        return [RowResult(0, [self.number])]


class Device:
    """A StepRunner that notes what it was given."""

    depth = 2
    needs_results = False

    def __init__(self) -> None:
        self.over: set[int] = set()
        self.log: list[str] = []
        self._number = 0

    def ready(self, rank: int, engine: str) -> Any:
        from core.messages import WorkerReady

        return WorkerReady(rank=rank, engine=engine, block_size=16, kv_specs=[], num_blocks=[], max_num_seqs=1,
                           max_step_tokens=1)  # fmt: skip

    def forward(self, batch: Batch) -> None:
        self._number = batch.step
        self.log.append(f"launch {batch.step}")

    def sample(self) -> Step:
        return Step(self._number, self.over)


class Channel:
    """Frames in the order of the script: a list of messages, or a call that changes the device."""

    def __init__(self, script: list[Any], log: list[str]) -> None:
        self.script = deque([*script, [Shutdown()]])
        self.log = log

    def receive(self, timeout_s: float | None = None) -> list[Any] | None:
        entry = self.script.popleft() if self.script else None
        if callable(entry):
            entry()
            return None
        return list(entry) if entry else None

    def send(self, messages: list[Any]) -> None:
        self.log += [f"answer {message.step}" for message in messages if isinstance(message, BatchResult)]


def test_a_batch_that_comes_while_the_device_computes_is_launched_at_once() -> None:
    device = Device()
    batches = [Batch("", n, [Scheduled(0, n, 1, True)], reset=n == 1) for n in (1, 2, 3)]
    nothing: Any = lambda: None  # noqa: E731
    channel = Channel(
        [
            [batches[0]], nothing, nothing, [batches[1]], nothing, nothing, nothing, lambda: device.over.add(1),
            nothing, nothing, nothing, [batches[2]], nothing, nothing, lambda: device.over.update((2, 3)),
            *[nothing] * 8,
        ],
        device.log,
    )  # fmt: skip
    process: Any = SimpleNamespace(
        index=0, stopping=False, model=SimpleNamespace(engine="e"), poll_control=nothing, beat=lambda snapshot: None
    )
    stand_in: Any = channel
    Worker(process, stand_in, device).run()
    assert device.log == ["launch 1", "launch 2", "answer 1", "launch 3", "answer 2", "answer 3"]
