"""Drives a StepRunner with hand-made Batches: a scheduler of a few lines, whose every decision a test can fix."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.messages import Batch, NewSequence, RowBlocks, RowResult, Scheduled, TokenLogprobs
from models.runtime.step import StepRunner
from quire import SamplingParams


@dataclass
class Stream:
    """A sequence of a test. `cuts`: numbers of output tokens at which it is preempted; `joins`: its first step."""

    prompt: list[int]
    sampling: SamplingParams
    count: int
    choice: int = 0
    eos_ids: tuple[int, ...] = ()
    cuts: set[int] = field(default_factory=set)
    joins: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    row: int | None = None
    computed: int = 0

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output)


class Driver:
    """Gives rows and blocks away: row r owns the blocks r, r + rows, r + 2 rows, …: tables are never in order."""

    def __init__(self, runner: StepRunner, rows: int, blocks_per_row: int, groups: int = 1) -> None:
        self.runner = runner
        self.rows = rows
        self.blocks_per_row = blocks_per_row
        self.groups = groups
        self.free = list(range(rows))
        self.step = 0
        self.reset = True

    def run(self, streams: list[Stream], chunk: int = 1 << 30) -> list[Stream]:
        """Until every stream has its `count` tokens; a step computes up to `chunk` tokens of each."""
        released: list[int] = []
        turn = 0
        while any(len(stream.output) < stream.count for stream in streams):
            live = [s for s in streams if s.joins <= turn and len(s.output) < s.count]
            turn += 1
            new = [self._place(stream) for stream in live if stream.row is None]
            blocks = [
                RowBlocks(sequence.row, group, 0, [sequence.row + i * self.rows for i in range(self.blocks_per_row)])
                for sequence in new
                for group in range(self.groups)
            ]
            parts = sorted((self._share(stream, chunk) for stream in live), key=lambda s: s.num_tokens != 1)
            if not parts:
                continue
            self.step += 1
            batch = Batch("", self.step, parts, new, released, blocks, reset=self.reset)
            self.reset, released = False, []
            self.runner.forward(batch)
            answers = {result.row: result for result in self.runner.sample().results()}
            by_row = {part.row: part for part in parts}
            for stream in live:
                assert stream.row is not None
                self._take(stream, by_row[stream.row], answers.get(stream.row))
                if len(stream.output) in stream.cuts or len(stream.output) == stream.count:
                    stream.cuts.discard(len(stream.output))
                    released.append(stream.row)
                    self.free.append(stream.row)
                    stream.row, stream.computed = None, 0
        return streams

    def _place(self, stream: Stream) -> NewSequence:
        stream.row = self.free.pop(0)
        return NewSequence(
            stream.row, stream.choice, stream.prompt, list(stream.output), stream.sampling, list(stream.eos_ids)
        )

    def _share(self, stream: Stream, chunk: int) -> Scheduled:
        assert stream.row is not None
        num = min(chunk, stream.known - stream.computed)
        wants = stream.sampling.prompt_logprobs is not None and len(stream.prompt_logprobs) < len(stream.prompt) - 1
        return Scheduled(stream.row, stream.computed, num, stream.computed + num == stream.known, wants)

    def _take(self, stream: Stream, part: Scheduled, answer: RowResult | None) -> None:
        stream.computed = part.start + part.num_tokens
        assert (answer is not None) == (part.sample or (part.prompt_logprobs and part.start + 1 < len(stream.prompt)))
        if answer is not None:
            stream.output += answer.token_ids
            stream.logprobs += answer.logprobs
            stream.prompt_logprobs += answer.prompt_logprobs
