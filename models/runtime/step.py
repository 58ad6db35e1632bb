"""StepRunner: what the worker's loop needs of whatever executes Batches. No torch here: the null device has none."""

from __future__ import annotations

from typing import Protocol

from core.messages import Batch, RowResult, WorkerReady

STEP_TOKENS = 2048  # most tokens of one step: a long prompt then holds the others up for one chunk, not for all of it


class BadRow(Exception):
    """A Batch asks something impossible of some rows; nothing was computed, and the worker is as usable as before."""

    def __init__(self, rows: list[int], message: str) -> None:
        super().__init__(message)
        self.rows = rows


class PendingStep(Protocol):
    """A step whose results may still be on their way."""

    @property
    def due_s(self) -> float:
        """CLOCK_MONOTONIC time before which `results` would wait; 0 when it is not known."""
        ...

    def done(self) -> bool:
        """Whether `results` need not wait (a millisecond at most)."""
        ...

    def results(self) -> list[RowResult]:
        """Wait, and give one RowResult per row that sampled or answered prompt log-probabilities."""
        ...

    @property
    def busy_s(self) -> float:
        """Seconds of the device's time, known after `results`."""
        ...


class StepRunner(Protocol):
    """Executes Batches in order, in two stages, and may launch a step before the last one's results are taken."""

    @property
    def depth(self) -> int:
        """Steps that may be launched and not yet answered: 2 on a device with a queue, 1 where launching computes."""
        ...

    def ready(self, rank: int, engine: str) -> WorkerReady:
        """The facts that the scheduler needs."""
        ...

    def forward(self, batch: Batch) -> None:
        """Apply a Batch's changes and compute logits. Raises BadRow; after any other exception the worker must end."""
        ...

    @property
    def needs_results(self) -> bool:
        """Whether `sample` must wait for the results of an earlier step: its rows draw by a grammar."""
        ...

    def sample(self) -> PendingStep:
        """The second stage of the step whose `forward` came last."""
        ...
