"""ModelRunner: executes Batches with a model, in two stages: forward (tokens to logits) and sample (logits to ids)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from core.grammar_rows import Allowed, GrammarRows
from core.messages import Batch, Scheduled, WorkerReady
from hw.backend import Backend, Forward, Span, StepGraphs
from hw.kvcache import KVCachePool
from models.runtime.inputs import RowState
from models.runtime.results import HostOutput, RunnerStep
from models.runtime.sampler import Sampler
from models.runtime.step import BadRow

PROMPT_LOGITS_ROWS = 256  # logits of a long prompt are made in pieces: at a vocabulary of 128k, one row is half a MiB

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [m, hidden] -> logits [m, vocab] of the model's dtype, whole on every rank."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a runner holds: rows, tokens of one sequence, tokens of one step."""

    max_num_seqs: int
    max_model_len: int
    max_step_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Current:
    """What `forward` leaves to `sample`. hidden [tokens, hidden]; logits [rows that sample, vocab] or None."""

    scheduled: list[Scheduled]
    hidden: torch.Tensor
    logits: torch.Tensor | None
    query_start: list[int]
    span: Span


class ModelRunner:
    """Runs one rank's share of a model. Collaborators come in ready-made.

    Args:
        forward, logits: the model's two halves, see `Forward` and `Logits`.
        graphs: `forward` captured, for devices that replay; captured here, since it needs the tables of the state.
        grammars: where constrained rows stand in their grammars.
    """

    def __init__(
        self,
        forward: Forward,
        logits: Logits,
        backend: Backend,
        pool: KVCachePool,
        limits: Limits,
        grammars: GrammarRows,
        weights_bytes: int = 0,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.depth = 1 if backend.device.type == "cpu" else 2
        self._model: Forward = forward if graphs is None else graphs
        self._logits = logits
        self._backend = backend
        self._pool = pool
        self._limits = limits
        self._step_sizes = [] if graphs is None else graphs.sizes
        self._pad: Callable[[int], int] = (lambda tokens: tokens) if graphs is None else graphs.pad
        self._grammars = grammars
        self._weights_bytes = weights_bytes
        self._state = RowState(
            limits.max_num_seqs,
            limits.max_model_len,
            limits.vocab_size,
            pool.layout.block_size,
            len(pool.layout.groups),
            backend.device,
        )
        self._sampler = Sampler(limits.max_num_seqs, limits.vocab_size, self._state.token_ids)
        self._current: Current | None = None
        if graphs is not None:
            with torch.inference_mode():
                graphs.capture(self._state.groups(), pool.layers)

    def ready(self, rank: int, engine: str) -> WorkerReady:
        """The facts that the scheduler needs."""
        layout = self._pool.layout
        return WorkerReady(
            rank=rank,
            engine=engine,
            block_size=layout.block_size,
            kv_specs=layout.specs(),
            num_blocks=layout.num_blocks,
            max_num_seqs=self._limits.max_num_seqs,
            max_step_tokens=self._limits.max_step_tokens,
            device=self._backend.capabilities.device_name,
            weights_bytes=self._weights_bytes,
            kv_bytes=layout.total_bytes,
            ideal_step_tokens=self._backend.capabilities.ideal_step_tokens,
            step_sizes=self._step_sizes,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        """Apply a Batch's changes, then run the model up to the logits of the rows that sample.

        Raises BadRow before anything is computed; any other exception leaves the device's state unknown.
        """
        span = self._backend.span()
        self._apply(batch)
        scheduled = batch.scheduled
        num_tokens = sum(s.num_tokens for s in scheduled)
        tokens = self._state.inputs(scheduled, self._pad(num_tokens))
        hidden = self._model(tokens.ids, tokens.step, self._pool.layers)
        query_start = tokens.step.host.query_start
        last = [query_start[i + 1] - 1 for i, s in enumerate(scheduled) if s.sample]
        if len(last) == hidden.shape[0]:
            logits = self._logits(hidden)
        elif last:
            # torch.tensor(..., device=...) would wait for everything that is queued on the device.
            logits = self._logits(hidden.index_select(0, torch.tensor(last).to(hidden.device, non_blocking=True)))
        else:
            logits = None
        self._current = Current(scheduled, hidden, logits, query_start, span)

    @property
    def needs_results(self) -> bool:
        """Whether a row that draws by a grammar still has its last token on the device."""
        return self._current is not None and self._grammars.pending(self._current.scheduled)

    @torch.inference_mode()
    def sample(self) -> RunnerStep:
        """Draw the tokens of the step whose `forward` came last, and start their way to the host."""
        current, self._current = self._current, None
        if current is None:
            raise RuntimeError("sample() without forward()")
        sampled = [s for s in current.scheduled if s.sample]
        drawn: HostOutput | None = None
        wanted: list[int | None] = []
        allowed: Allowed | None = None
        if current.logits is not None:
            rows = [s.row for s in sampled]
            allowed = self._grammars.allowed(rows)
            inputs = self._sampler.inputs(rows, [s.start + s.num_tokens for s in sampled], allowed)
            output = self._backend.ops.sample(current.logits, inputs)
            self._state.put_drawn(inputs.state_rows, inputs.lens, output.ids)
            drawn = HostOutput(output, self._backend)
            wanted = [self._sampler.num_logprobs(row) for row in rows]
        prompts = self._prompt_logprobs(current)
        grammars = {} if allowed is None else allowed.rows
        current.span.end()
        step = RunnerStep(current.scheduled, drawn, wanted, grammars, current.span)
        for row, piece, alternatives in prompts:
            step.add_prompt(row, piece, alternatives)
        return step

    def _apply(self, batch: Batch) -> None:
        # Rows are released by whoever takes them next, who overwrites all of them; only grammars hold something.
        if batch.reset:
            self._grammars.clear()
        self._grammars.release(batch.released)
        for new in batch.new:
            self._state.begin(new)
            self._sampler.begin(new)
            self._grammars.begin(new)
        self._state.set_blocks(batch.blocks)
        drafted = [s.row for s in batch.scheduled if s.draft_ids]
        if drafted:
            raise BadRow(drafted, "draft_ids: speculative decoding is not supported by this worker")
        copies: dict[int, list[tuple[int, int]]] = {}
        for copy in batch.copies:
            copies.setdefault(copy.group, []).append((copy.src, copy.dst))
        for group, pairs in copies.items():
            self._backend.copy_blocks(self._pool, group, pairs)

    def _prompt_logprobs(self, current: Current) -> list[tuple[int, HostOutput, list[int | None]]]:
        """Log-probabilities of the prompt tokens that follow the step's positions."""
        answers: list[tuple[int, HostOutput, list[int | None]]] = []
        for i, s in enumerate(current.scheduled):
            if not s.prompt_logprobs:
                continue
            count = min(s.num_tokens, int(self._state.prompt_lens[s.row]) - 1 - s.start)
            num_top = self._sampler.num_prompt_logprobs(s.row)
            for piece in range(0, count, PROMPT_LOGITS_ROWS):
                size = min(PROMPT_LOGITS_ROWS, count - piece)
                at, position = current.query_start[i] + piece, s.start + piece + 1
                ids = self._state.token_ids[s.row, position : position + size]
                output = self._backend.ops.logprobs(self._logits(current.hidden[at : at + size]), ids, num_top)
                answers.append((s.row, HostOutput(output, self._backend), [num_top] * size))
        return answers
