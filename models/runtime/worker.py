"""The worker process: one device. Its loop: receive, launch, answer.

Batches are taken from the socket as they come, also between the two stages of a step and while a device computes: the
loop never waits for a step as long as another could be launched behind it, or the device would idle in between. All
ranks of a group run every Batch; rank 0 answers.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from core.channel import Client
from core.errors import QuireError
from core.messages import Batch, BatchResult, Introduce, Shutdown, ToWorker, WorkerFailed, WorkerReady
from core.process import Process, freeze_heap
from core.stats import WorkerSnapshot
from hw.null.runner import NullRunner
from models.runtime.step import BadRow, PendingStep, StepRunner

IDLE_S = 0.2  # between two looks at the supervisor's line when there is nothing to do
CONTROL_S = 0.1  # the same when there is


class StepFailed(Exception):
    """A step failed in a way that leaves the device's state unknown; the scheduler has been told."""


@dataclass(frozen=True, slots=True)
class Received:
    """A Batch and the time at which it left the socket."""

    batch: Batch
    received_s: float


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that waits for its answer."""

    received: Received
    pending: PendingStep


class Worker:
    """The loop; collaborators come in ready-made."""

    def __init__(self, process: Process, channel: Client[Batch | Introduce | Shutdown], runner: StepRunner) -> None:
        self.process = process
        self.channel = channel
        self.runner = runner
        self.rank = process.index
        self.inbox: deque[Received] = deque()
        self.launched: deque[Launched] = deque()
        self.needs_reset = True  # of what came before the first reset, or after a failure, nothing is known here
        self.snapshot = WorkerSnapshot()
        self._stop = False
        self._look_s = 0.0

    def run(self) -> None:
        """Receive, launch, answer; until stopped. Raises StepFailed when this process must end."""
        ready = self.introduction()
        self.snapshot = WorkerSnapshot(device=ready.device, weights_bytes=ready.weights_bytes, kv_bytes=ready.kv_bytes)
        self.channel.send([ready])
        while not self._stop:
            self.receive(self.patience_s())
            if self.inbox and len(self.launched) < self.runner.depth:
                self.launch(self.inbox.popleft())
            elif self.launched and self.launched[0].pending.done():
                self.answer(self.launched.popleft())
            self.look_at_control()

    def introduction(self) -> WorkerReady:
        """What the scheduler must know of this rank, and of this life of it."""
        ready = self.runner.ready(self.rank, self.process.model.engine)
        return msgspec.structs.replace(ready, pid=os.getpid())

    def patience_s(self) -> float:
        """How long to wait for a Batch: not at all when there is work at hand."""
        if self.inbox and len(self.launched) < self.runner.depth:
            return 0.0
        if self.launched:
            return min(IDLE_S, max(0.0, self.launched[0].pending.due_s - time.monotonic()))
        return IDLE_S

    def receive(self, timeout_s: float) -> None:
        """Take every frame that is there; wait up to `timeout_s` for the first."""
        while (messages := self.channel.receive(timeout_s)) is not None:
            timeout_s = 0.0
            received_s = time.monotonic()
            for message in messages:
                match message:
                    case Batch():
                        self.inbox.append(Received(message, received_s))
                    case Introduce():
                        self.inbox.clear()
                        self.needs_reset = True
                        self.channel.send([self.introduction()])
                    case Shutdown():
                        self._stop = True

    def launch(self, received: Received) -> None:
        """Run both stages of a step.

        A grammar asks for the token before; it is taken, and the mask made, while the device computes this forward.
        """
        batch = received.batch
        if self.needs_reset and not batch.reset:
            return
        self.needs_reset = False
        try:
            self.runner.forward(batch)
            self.receive(0.0)
            while self.launched and self.runner.needs_results:
                self.answer(self.launched.popleft())
            self.launched.append(Launched(received, self.runner.sample()))
        except BadRow as error:
            self.fail(batch.step, str(error), error.rows)
        except Exception as error:
            self.fail(batch.step, f"{type(error).__name__}: {error}", [])
            raise StepFailed(f"step {batch.step} failed") from error

    def fail(self, step: int, message: str, rows: list[int]) -> None:
        """Tell the scheduler, after what was launched before; it starts over with a reset."""
        while self.launched:
            self.answer(self.launched.popleft())
        self.needs_reset = True
        self.channel.send([WorkerFailed(self.rank, step, message, rows)])

    def answer(self, launched: Launched) -> None:
        """Wait for a step's results and send them."""
        results = launched.pending.results()
        self.receive(0.0)
        batch, busy_s = launched.received.batch, launched.pending.busy_s
        self.snapshot.steps += 1
        self.snapshot.busy_s += busy_s
        if self.rank == 0:
            done_s = time.monotonic()
            received_s = launched.received.received_s
            self.channel.send([BatchResult(batch.engine, batch.step, results, received_s, done_s, busy_s)])

    def look_at_control(self) -> None:
        """Heartbeat and the supervisor's orders, a few times a second."""
        now = time.monotonic()
        if now < self._look_s:
            return
        self._look_s = now + CONTROL_S
        self.process.poll_control()
        self.process.beat(self.snapshot)
        self._stop = self._stop or self.process.stopping


def make_runner(process: Process) -> tuple[StepRunner, dict[str, float]]:
    """The runner that the options ask for, and the seconds of its phases."""
    if process.config.device == "null":
        return NullRunner(process.config, process.model), {}
    # torch is heavy, and the null device does without: importing it is the first phase of a real worker's start.
    begin_s = time.monotonic()
    # Read when torch is loaded. Compute threads wait for each other without pause, by default for milliseconds: where
    # another process has one's core, each of hundreds of waits in a step then lasts that long (measured: 6 to 40 times
    # slower). This long, some microseconds, costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from models.runtime.build import build_runner

    phases = {"import": time.monotonic() - begin_s}
    return build_runner(process, phases), phases


def main() -> None:
    """Entry point of a worker process."""
    process = Process.start("worker")
    context: zmq.Context[Any] = zmq.Context()
    channel: Client[Batch | Introduce | Shutdown] = Client(
        context, process.address("workers"), ToWorker, name=process.name
    )
    try:
        runner, phases = make_runner(process)
        ready = runner.ready(process.index, process.model.engine)
        process.ready(detail=describe(ready), phases=phases, facts={"device": ready.device})
        freeze_heap()
        Worker(process, channel, runner).run()
    except QuireError as error:
        # A wrong option or checkpoint: the sentence says it all, a traceback would hide it.
        sys.stderr.write(f"quire: {process.name}: {error.message}\n")
        raise SystemExit(1) from None
    finally:
        channel.close()
        context.term()
        process.finish()


def describe(ready: WorkerReady) -> str:
    """The memory plan in one line."""
    plan = ", ".join(
        f"{blocks * ready.block_size:,} tokens ({_mib(blocks * ready.block_size * spec.bytes_per_token)})"
        for spec, blocks in zip(ready.kv_specs, ready.num_blocks, strict=True)
    )
    return f"{ready.device}: weights {_mib(ready.weights_bytes)}, KV cache {plan}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
