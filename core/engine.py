"""The engine: the scheduler process. Its loop reads as the algorithm: receive, schedule, send, publish.

One step ahead: while the workers run Batch N, Batch N+1 already waits in their sockets (never more than that one), so
a device does not wait for Python. The scheduler is pure; this file is its sockets and its clock.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any

import msgspec
import zmq

from core.admission import Bounds, Reached
from core.channel import ChannelFull, PeerGone, Server
from core.deadlines import Deadlines
from core.messages import (
    Abort,
    BatchResult,
    Failed,
    FromWorker,
    Hello,
    Introduce,
    QueueState,
    Rejected,
    SequenceOutput,
    Shutdown,
    StepOutput,
    Stop,
    Submit,
    ToScheduler,
    WorkerFailed,
    WorkerReady,
)
from core.meter import StepMeter
from core.process import Process, freeze_heap
from core.scheduler import Limits, Scheduler

MAX_STEPS_IN_FLIGHT = 2  # one running, one waiting in the worker's socket
MAX_POLL_S = 0.2
TURN_S = 0.005  # after so long with arrivals, the device has its turn
TELL_S = 0.05  # the doors hear at most so often how full the house is

# A step, its news, and the seconds in the queue of each request whose first token is among them.
StepNews = tuple[int, list[SequenceOutput], dict[str, float]]


class Workers:
    """The ranks of this engine as the scheduler sees them: who is ready, and the one frame that reaches all."""

    def __init__(self, server: Server[FromWorker], num_ranks: int) -> None:
        self.server = server
        self.num_ranks = num_ranks
        self.ready: dict[int, WorkerReady] = {}
        self.complete = False
        self.asked: set[int] = set()

    def introduce(self) -> None:
        """Ask each rank that has said nothing yet, once: a scheduler that was restarted finds its workers loaded."""
        for rank in range(self.num_ranks):
            if rank not in self.ready and rank not in self.asked:
                with contextlib.suppress(PeerGone):  # it is not connected yet
                    self.server.send(f"worker-{rank}", [Introduce()])
                    self.asked.add(rank)

    def register(self, ready: WorkerReady) -> bool:
        """Note a rank's WorkerReady; True when it completes the group.

        A rank that reports again has been restarted, and so have all of its partners: the group starts over.
        """
        known = self.ready.get(ready.rank)
        if known is not None and known.pid == ready.pid:
            return False  # the answer to Introduce, after it had spoken by itself
        if self.complete:
            self.complete = False
            self.ready.clear()
        self.ready[ready.rank] = ready
        self.complete = len(self.ready) == self.num_ranks
        return self.complete

    def broadcast(self, message: Any) -> bool:
        """Send to every rank; False when one is gone (the group will come back as a whole)."""
        try:
            for rank in range(self.num_ranks):
                self.server.send(f"worker-{rank}", [message])
        except PeerGone:
            self.complete = False
            self.ready.clear()
        return self.complete


class Tokenizers:
    """The tokenizer processes: which one holds which request, and one frame per step for each of them."""

    def __init__(self, server: Server[ToScheduler], engine: str) -> None:
        self.server = server
        self.engine = engine
        self.owner: dict[str, str] = {}
        self.names: set[str] = set()
        self._told = QueueState(0, 0, 0)

    def greet(self, peer: str) -> None:
        """A tokenizer process speaks; when this process, or that one, is new, it knows of no state."""
        if peer not in self.names:
            self.names.add(peer)
            self._send(peer, self._told)

    def tell(self, state: QueueState) -> None:
        """Let every tokenizer know how full the house is, if that is news."""
        if state != self._told:
            self._told = state
            for peer in self.names:
                self._send(peer, state)

    def publish(self, news: StepNews) -> list[str]:
        """Send a step's news; returns the ids of requests whose tokenizer is gone."""
        step, outputs, queued_s = news
        by_peer: dict[str, list[SequenceOutput]] = {}
        for output in outputs:
            peer = self.owner.get(output.request_id)
            if peer is not None:
                by_peer.setdefault(peer, []).append(output)
        orphans: list[str] = []
        for peer, mine in by_peer.items():
            if not self._send(peer, StepOutput(self.engine, step, mine, queued_s)):
                orphans += [request_id for request_id, owner in self.owner.items() if owner == peer]
        return orphans

    def end(self, ending: Rejected | Failed) -> None:
        """Send a request's ending."""
        peer = self.owner.pop(ending.request_id, None)
        if peer is not None:
            self._send(peer, ending)

    def _send(self, peer: str, message: Any) -> bool:
        try:
            self.server.send(peer, [message])
        except (PeerGone, ChannelFull):
            return False
        return True


class Engine:
    """The loop. Collaborators come in ready-made; `run` returns when the supervisor asks for the end."""

    def __init__(self, process: Process, tokenizers: Tokenizers, workers: Workers, bounds: Bounds) -> None:
        self.process = process
        self.tokenizers = tokenizers
        self.workers = workers
        self.scheduler: Scheduler | None = None
        self.in_flight: set[int] = set()  # steps
        self.backlog: deque[tuple[str, Submit]] = deque()  # arrived before the workers were ready
        self.deadlines = Deadlines(tokenizers.owner)
        self.bounds = bounds
        self.tell_at_s = 0.0
        self.meter = StepMeter()
        self.needs_reset = True

    def run(self) -> None:
        """Receive, schedule, send, publish; until stopped."""
        poller = zmq.Poller()
        for socket in (self.tokenizers.server.socket, self.workers.server.socket, self.process.control.socket):
            poller.register(socket, zmq.POLLIN)
        while not self.process.stopping:
            poller.poll(1 + int(1000 * self.deadlines.wait_s(time.monotonic(), MAX_POLL_S)))
            if not self.workers.complete:
                self.workers.introduce()
            self.receive_requests()
            outputs = self.receive_results()
            self.send_batches()
            self.publish(outputs)
            self.expire()
            self.tell_state()
            self.process.poll_control()
            self.beat()
        self.workers.broadcast(Shutdown("the server stops"))

    # ------------------------------------------------------------------------------------------ receive

    def receive_requests(self) -> None:
        """Take what the tokenizers have sent; of a flood, as much as a turn has time for."""
        end_s = time.monotonic() + TURN_S
        while time.monotonic() < end_s and (frame := _receive(self.tokenizers.server)) is not None:
            peer, messages = frame
            self.tokenizers.greet(peer)
            for message in messages:
                match message:
                    case Submit():
                        self.admit(peer, message)
                    case Stop(request_id, choice):
                        if self.scheduler is not None and self.scheduler.stop(request_id, choice):
                            self.tokenizers.owner.pop(request_id, None)
                            self.meter.ended(request_id)
                    case Abort(request_id):
                        self.abort(request_id)
                    case Hello():
                        for request_id in [key for key, owner in self.tokenizers.owner.items() if owner == peer]:
                            self.abort(request_id)
                        self.tokenizers.names.discard(peer)
                        self.tokenizers.greet(peer)

    def admit(self, peer: str, submit: Submit) -> None:
        """Queue a request, or refuse it with the reason."""
        if self.scheduler is not None and (old := self.scheduler.requests.get(submit.request_id)) is not None:
            if submit.epoch <= old.submit.epoch:
                return  # late words of the request's earlier life
            self.abort(submit.request_id)
        self.tokenizers.owner[submit.request_id] = peer
        self.deadlines.add(submit.request_id, submit.deadline_s)
        if self.scheduler is None:
            self.backlog.append((peer, submit))
            return
        if (reason := self.scheduler.fits(submit)) is not None:
            self.tokenizers.end(Rejected(submit.request_id, "context_length_exceeded", reason, "messages"))
            return
        if submit.epoch == 0 and not self.make_way(submit):  # one that was resumed has been let in
            return
        self.meter.admitted(submit.request_id, submit.arrival_s, not self.scheduler.requests)
        self.scheduler.add(submit)

    def make_way(self, submit: Submit) -> bool:
        """Whether a newcomer is within the bounds. In a full queue the newest of whoever has most gives way to it;
        whoever has most already is refused. So nobody can fill the queue for the others."""
        assert self.scheduler is not None
        scheduler, tokens = self.scheduler, sum(len(segment.ids) for segment in submit.segments)
        while (
            reached := self.bounds.reached(
                scheduler.num_waiting, scheduler.queued_tokens, len(scheduler.requests), tokens
            )
        ) is not None:
            loser = scheduler.surplus(submit, reached.excess_tokens)
            self.refuse(loser or submit.request_id, reached)
            if loser is None:
                return False
        return True

    def refuse(self, request_id: str, reached: Reached) -> None:
        """End a request that has not begun, because of a bound."""
        assert self.scheduler is not None
        self.meter.refuse(reached.bound)
        drain_s = self.meter.drain.seconds(self.scheduler.num_waiting, self.scheduler.queued_tokens)
        self.tokenizers.end(Rejected(request_id, "queue_full", reached.message, None, drain_s))
        self.free(request_id)

    def abort(self, request_id: str) -> None:
        """The client went away; the tokenizer knows."""
        if self.free(request_id) and self.scheduler is not None:
            self.scheduler.counters.aborted += 1

    def free(self, request_id: str) -> bool:
        """Free everything of a request at once; whether the scheduler had it."""
        self.tokenizers.owner.pop(request_id, None)
        self.meter.dropped(request_id)
        if self.scheduler is not None:
            return self.scheduler.abort(request_id)
        self.backlog = deque(item for item in self.backlog if item[1].request_id != request_id)
        return False

    def receive_results(self) -> list[StepNews]:
        """Take everything that the workers have sent; returns the steps' news, not yet published."""
        news: list[StepNews] = []
        while (frame := _receive(self.workers.server)) is not None:
            for message in frame[1]:
                match message:
                    case BatchResult() if self.scheduler is not None and message.step in self.in_flight:
                        self.in_flight.discard(message.step)
                        self.end_ungrammatical(message)
                        outputs = self.scheduler.update(message)
                        queued_s = self.meter.observe(message, outputs, self.scheduler)
                        news.append((message.step, outputs, queued_s))
                    case WorkerReady():
                        self.register(message)
                    case WorkerFailed() if self.scheduler is not None and message.step in self.in_flight:
                        self.fail_step(message)
        return news

    def end_ungrammatical(self, result: BatchResult) -> None:
        """End requests whose grammar cost more than it may, or was left; nobody else is touched."""
        assert self.scheduler is not None
        for request_id, error in self.scheduler.grammar_errors(result).items():
            self.scheduler.abort(request_id)
            self.meter.dropped(request_id)
            self.tokenizers.end(Failed(request_id, "invalid_grammar", error))

    def register(self, ready: WorkerReady) -> None:
        """A rank is ready; with the last one, work begins, or begins again after the group's restart."""
        if not self.workers.register(ready):
            return
        self.in_flight.clear()
        self.needs_reset = True
        if self.scheduler is None:
            self.scheduler = make_scheduler(ready, self.process)
            self.process.ready(detail=describe(self.workers.ready))
            while self.backlog:
                self.admit(*self.backlog.popleft())
            freeze_heap()
        else:
            self.scheduler.reset_workers()
            self.meter.restarted(bool(self.scheduler.requests))
            self.meter.worker_restarts += 1

    def fail_step(self, failure: WorkerFailed) -> None:
        """End the requests of a step that the workers could not run; everybody else goes on by recomputation."""
        assert self.scheduler is not None
        if failure.step not in self.in_flight:
            return
        for request_id in self.scheduler.requests_of(failure.step, failure.rows):
            self.scheduler.abort(request_id)
            self.meter.dropped(request_id)
            text = f"step {failure.step} failed on rank {failure.rank}: {failure.message}"
            self.tokenizers.end(Failed(request_id, "worker_failed", text))
        self.in_flight.clear()
        self.scheduler.reset_workers()
        self.meter.restarted(bool(self.scheduler.requests))
        self.needs_reset = True

    # ------------------------------------------------------------------------------------------ schedule and send

    def send_batches(self) -> None:
        """Keep the workers one step ahead."""
        if self.scheduler is None or not self.workers.complete:
            return
        while len(self.in_flight) < MAX_STEPS_IN_FLIGHT:
            batch = self.scheduler.schedule()
            if batch is None:
                return
            batch = msgspec.structs.replace(
                batch, engine=self.process.model.engine, sent_s=time.monotonic(), reset=self.needs_reset
            )
            self.needs_reset = False
            self.in_flight.add(batch.step)
            alive = self.workers.broadcast(batch)
            # After sending: the device's work goes first.
            new_ids = self.scheduler.requests_of(batch.step, [new.row for new in batch.new]) if batch.new else ()
            self.meter.sent(batch, self.scheduler.counters.step_tokens, new_ids)
            if not alive:
                return

    # ------------------------------------------------------------------------------------------ publish

    def publish(self, news: list[StepNews]) -> None:
        """One frame per step and tokenizer. Comes after sending: the device's work goes first."""
        scheduler = self.scheduler
        for step_news in news:
            for request_id in self.tokenizers.publish(step_news):
                self.abort(request_id)
        # Only now: a request that ends in the second of two steps has news in the first one, too.
        for _, outputs, _ in news:
            for output in outputs:
                if output.finish_reason is not None and scheduler is not None and not scheduler.has(output.request_id):
                    self.tokenizers.owner.pop(output.request_id, None)

    def expire(self) -> None:
        """End requests whose deadline has passed."""
        for request_id in self.deadlines.expired(time.monotonic()):
            state = "running" if self.scheduler is not None and self.scheduler.has_begun(request_id) else "waiting"
            self.meter.expired[state] += 1
            text = f"the request's deadline passed while it was {state}; everything of it has been freed"
            self.tokenizers.end(Failed(request_id, "deadline_exceeded", text))
            self.free(request_id)

    def tell_state(self) -> None:
        """Let the doors know how full the house is, once it is half full."""
        now = time.monotonic()
        if self.scheduler is None or now < self.tell_at_s:
            return
        self.tell_at_s = now + TELL_S
        waiting, tokens = self.scheduler.num_waiting, self.scheduler.queued_tokens
        requests = len(self.scheduler.requests)
        state = QueueState(0, 0, 0)
        if self.bounds.reached(2 * waiting, 2 * tokens, 2 * requests) is not None:
            state = QueueState(waiting, tokens, requests, round(self.meter.drain.seconds(waiting, tokens)))
        self.tokenizers.tell(state)

    def beat(self) -> None:
        """Statistics ride on the heartbeat, which comes from this loop and nowhere else."""
        if not self.process.control.due():
            return
        self.process.beat(None if self.scheduler is None else self.meter.snapshot(self.scheduler))


def _receive(server: Server[Any]) -> tuple[str, list[Any]] | None:
    return server.receive(0)


def make_scheduler(ready: WorkerReady, process: Process) -> Scheduler:
    """A scheduler for what the workers can hold."""
    limits = Limits(
        max_num_seqs=ready.max_num_seqs,
        max_step_tokens=ready.max_step_tokens,
        max_model_len=process.model.max_model_len,
        ideal_step_tokens=ready.ideal_step_tokens,
        step_sizes=tuple(ready.step_sizes),
    )
    caching = process.config.prefix_caching
    # Workers may still answer steps of a scheduler that died: no number of its is used again (steps take over 1 µs).
    first_step = int(time.monotonic() * 1e6)
    return Scheduler(
        limits, ready.kv_specs, ready.num_blocks, ready.block_size, process.model.engine, caching, first_step
    )


def describe(ranks: dict[int, WorkerReady]) -> str:
    """The engine in a line, for the start-up table."""
    ready = ranks[0]
    tokens = min(count * ready.block_size for count in ready.num_blocks)
    return f"{len(ranks)} worker(s) on {ready.device}, {tokens:,} KV tokens in blocks of {ready.block_size}"


def main() -> None:
    """Entry point of the scheduler process."""
    process = Process.start("scheduler")
    context: zmq.Context[Any] = zmq.Context()
    tokenizers = Tokenizers(Server(context, process.address("scheduler"), ToScheduler), process.model.engine)
    workers = Workers(Server(context, process.address("workers"), FromWorker), process.config.tensor_parallel_size)
    try:
        Engine(process, tokenizers, workers, Bounds.of(process.config)).run()
    finally:
        tokenizers.server.close()
        workers.server.close()
        context.term()
        process.finish()


if __name__ == "__main__":
    main()
