"""Results on their way from the device to the host: HostOutput of one op, RunnerStep of a whole step."""

from __future__ import annotations

from typing import Any

from core.grammar_rows import GrammarRow
from core.messages import RowResult, Scheduled, TokenLogprobs
from hw.backend import Backend, Span
from hw.ops import SampleOutput


class HostOutput:
    """A SampleOutput on its way to the host."""

    def __init__(self, output: SampleOutput, backend: Backend) -> None:
        fields = (output.ids, output.chosen, output.rank, output.top_ids, output.top_logprobs)
        self._copies = [None if tensor is None else backend.to_host(tensor) for tensor in fields]

    def ids(self) -> list[int]:
        """The ids; waits for them."""
        ids = self._list(0)
        return ids if ids is not None else []

    def logprobs(self, wanted: list[int | None]) -> list[list[TokenLogprobs]]:
        """Per row of the output: its log-probabilities with `wanted` alternatives, or [] where None is wanted."""
        chosen, ranks, top_ids, top_values = (self._list(i) for i in range(1, 5))
        if chosen is None or ranks is None or top_ids is None or top_values is None:
            return [[] for _ in wanted]
        return [
            [] if k is None else [TokenLogprobs(chosen[i], ranks[i], top_ids[i][:k], top_values[i][:k])]
            for i, k in enumerate(wanted)
        ]

    def done(self) -> bool:
        """Whether all of it has arrived."""
        return all(copy is None or copy.done() for copy in self._copies)

    def _list(self, index: int) -> list[Any] | None:
        copy = self._copies[index]
        return None if copy is None else copy.wait().tolist()


class RunnerStep:
    """A step under way; see PendingStep. `grammars`, by index among the rows that sampled, go on by what was drawn."""

    due_s = 0.0

    def __init__(
        self,
        scheduled: list[Scheduled],
        drawn: HostOutput | None,
        wanted: list[int | None],
        grammars: dict[int, GrammarRow],
        span: Span,
    ) -> None:
        self._span = span
        self._scheduled = scheduled
        self._drawn = drawn
        self._wanted = wanted
        self._prompts: dict[int, list[tuple[HostOutput, list[int | None]]]] = {}
        self._grammars = grammars

    def add_prompt(self, row: int, output: HostOutput, wanted: list[int | None]) -> None:
        """Attach (the next piece of) a row's prompt log-probabilities."""
        self._prompts.setdefault(row, []).append((output, wanted))

    @property
    def busy_s(self) -> float:
        """The device's seconds."""
        return self._span.seconds()

    def done(self) -> bool:
        """Whether `results` has nothing to wait for."""
        if self._drawn is not None and not self._drawn.done():
            return False
        return all(output.done() for pieces in self._prompts.values() for output, _ in pieces)

    def results(self) -> list[RowResult]:
        """One RowResult per row that has something to say; waits for the copies. Called once."""
        ids = [] if self._drawn is None else self._drawn.ids()
        logprobs = [] if self._drawn is None else self._drawn.logprobs(self._wanted)
        results: list[RowResult] = []
        at = 0
        for s in self._scheduled:
            pieces = self._prompts.get(s.row, [])
            prompt = [entry for output, wanted in pieces for line in output.logprobs(wanted) for entry in line]
            if s.sample:
                grammar = self._grammars.get(at)
                error = grammar.take(ids[at]) if grammar is not None else ""
                if error:
                    results.append(RowResult(s.row, [], [], prompt, error))
                else:
                    results.append(RowResult(s.row, [ids[at]], logprobs[at], prompt))
                at += 1
            elif prompt:
                results.append(RowResult(s.row, [], [], prompt))
        return results
