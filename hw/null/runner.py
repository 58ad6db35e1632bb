"""NullRunner: executes Batches with no model, no cache and no torch.

A token id is a hash of (seed, choice, position): the uniform distribution over the vocabulary without the model's
end-of-sequence ids. A logit bias of -100 bans an id and one of +100 forces it (end-of-sequence too), min_tokens holds
end and stop ids back; of a grammar's ids one is drawn, its end only where nothing else is left; everything else that
shapes a distribution does nothing. The step's time comes from StepTime, and steps queue up as on a device, so the
whole server runs as with a model and its own overhead can be measured.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from core.config import Config
from core.grammar import load_grammars
from core.grammar_rows import GrammarRows
from core.messages import Batch, KVSpec, NewSequence, RowResult, Scheduled, TokenLogprobs, WorkerReady
from core.model_info import ModelInfo
from hw import rng
from hw.null.step_time import StepTime

DEFAULT_BLOCK_SIZE = 16
DEFAULT_STEP_TOKENS = 8192
_CERTAIN = 100.0  # a bias of this size decides


@dataclass(slots=True)
class Row:
    """What the null device knows of a sequence. `special`: the draw is not simply the hash."""

    stream: int
    prompt_ids: list[int]
    min_tokens: int
    held_back: frozenset[int]  # end and stop ids, banned below min_tokens
    banned: frozenset[int]
    forced: list[int]
    logprobs: int | None
    prompt_logprobs: int | None

    @property
    def special(self) -> bool:
        return bool(self.min_tokens or self.banned or self.forced)


class NullStep:
    """A step under way: `results` sleeps until it is due."""

    def __init__(self, results: list[RowResult], due_s: float, busy_s: float) -> None:
        self.due_s = due_s
        self.busy_s = busy_s
        self._results = results

    def done(self) -> bool:
        """Whether it is due, or as good as."""
        return self.due_s - time.monotonic() < 0.001

    def results(self) -> list[RowResult]:
        """Wait until the step is over."""
        if (left_s := self.due_s - time.monotonic()) > 0:
            time.sleep(left_s)
        return self._results


class NullRunner:
    """A device of which only the time is real."""

    depth = 2

    def __init__(self, config: Config, model: ModelInfo) -> None:
        self._config = config
        self._model = model
        self._step_time = StepTime.parse(config.null_step_ms, config.null_step_table)
        self._rows: dict[int, Row] = {}
        # Where every id is an end of sequence, drawing one cannot be avoided.
        self._allowed = [t for t in range(model.vocab_size) if t not in set(model.eos_ids)] or [0]
        self._allowed_array = np.array(self._allowed, dtype=np.int64)
        self._logprob = -math.log(len(self._allowed))
        self._grammars = GrammarRows(model.vocab_size, lambda: load_grammars(model))
        self._batch: Batch | None = None
        self._free_s = 0.0

    def ready(self, rank: int, engine: str) -> WorkerReady:
        """As much cache as the sequences could ever fill, unless the options say less."""
        block_size = self._config.block_size or DEFAULT_BLOCK_SIZE
        most = self._config.max_num_seqs * (-(-(self._model.max_model_len + 1) // block_size)) + 1
        return WorkerReady(
            rank=rank,
            engine=engine,
            block_size=block_size,
            kv_specs=[KVSpec(num_layers=1, bytes_per_token=1)],
            num_blocks=[self._config.num_kv_blocks or min(most, 1 << 20)],
            max_num_seqs=self._config.max_num_seqs,
            max_step_tokens=self._config.max_step_tokens or DEFAULT_STEP_TOKENS,
            device="null",
        )

    def forward(self, batch: Batch) -> None:
        """Apply a Batch's changes and begin its time."""
        if batch.reset:
            self._rows.clear()
            self._grammars.clear()
        for row in batch.released:
            self._rows.pop(row, None)
        self._grammars.release(batch.released)
        for new in batch.new:
            self._rows[new.row] = _row(new)
            self._grammars.begin(new)
        self._batch = batch

    @property
    def needs_results(self) -> bool:
        """Ids are known as soon as they are drawn."""
        return False

    def sample(self) -> NullStep:
        """Draw the step's tokens; they may be taken when its time is over."""
        batch, self._batch = self._batch, None
        if batch is None:
            raise RuntimeError("sample() without forward()")
        sampled = [s for s in batch.scheduled if s.sample]
        ids = dict(zip([s.row for s in sampled], self._draw(sampled), strict=True))
        errors = self._constrain(ids)
        results: list[RowResult] = []
        for s in batch.scheduled:
            row = self._rows[s.row]
            prompt_logprobs = self._prompt_logprobs(s, row) if s.prompt_logprobs else []
            if s.sample or prompt_logprobs:
                token_ids = [ids[s.row]] if s.sample else []
                logprobs = [] if row.logprobs is None else [self._uniform(t, row.logprobs) for t in token_ids]
                error = errors.get(s.row, "")
                results.append(RowResult(s.row, [] if error else token_ids, logprobs, prompt_logprobs, error))
        busy_s = self._step_time.seconds(sum(s.num_tokens for s in batch.scheduled))
        self._free_s = max(self._free_s, time.monotonic()) + busy_s
        return NullStep(results, self._free_s, busy_s)

    def _draw(self, sampled: list[Scheduled]) -> list[int]:
        if not sampled:
            return []
        rows = [self._rows[s.row] for s in sampled]
        positions = [s.start + s.num_tokens - len(row.prompt_ids) for s, row in zip(sampled, rows, strict=True)]
        low, _ = rng.keys(np.array([row.stream for row in rows], dtype=np.uint64), np.array(positions))
        ids: list[int] = self._allowed_array[low.view(np.uint32) % len(self._allowed)].tolist()
        for i, row in enumerate(rows):
            if row.special:
                ids[i] = self._biased(row, positions[i], ids[i])
        return ids

    def _constrain(self, ids: dict[int, int]) -> dict[int, str]:
        """Put ids that their grammars allow in place of those drawn; returns the rows that cannot go on, and why."""
        rows = list(ids)
        allowed = self._grammars.allowed(rows)
        if allowed is None:
            return {}
        errors: dict[int, str] = {}
        for mask, (i, grammar) in zip(allowed.masks, allowed.rows.items(), strict=True):
            bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._model.vocab_size])
            going_on = np.setdiff1d(bits, self._model.eos_ids)
            choices = going_on if going_on.size else bits
            ids[rows[i]] = int(choices[rng.splitmix64(ids[rows[i]]) % choices.size])
            errors[rows[i]] = grammar.take(ids[rows[i]])
        return errors

    def _biased(self, row: Row, position: int, token: int) -> int:
        """The id that bias and min_tokens leave: forced, or the first of the hash's chain that is not banned."""
        banned = row.banned | row.held_back if position < row.min_tokens else row.banned
        for forced in row.forced:
            if forced not in banned:
                return forced
        key = rng.key(row.stream, position)
        for _ in range(64):
            if token not in banned:
                return token
            key = rng.splitmix64(key)
            token = self._allowed[key % len(self._allowed)]
        return next((t for t in self._allowed if t not in banned), token)  # nearly everything is banned

    def _uniform(self, token: int, num_top: int) -> TokenLogprobs:
        """The log-probabilities of the distribution that the ids are drawn from."""
        top_ids = self._allowed[:num_top]
        return TokenLogprobs(self._logprob, 0, top_ids, [self._logprob] * len(top_ids))

    def _prompt_logprobs(self, scheduled: Scheduled, row: Row) -> list[TokenLogprobs]:
        following = row.prompt_ids[scheduled.start + 1 : scheduled.start + scheduled.num_tokens + 1]
        return [self._uniform(token, row.prompt_logprobs or 0) for token in following]


def _row(new: NewSequence) -> Row:
    sampling = new.sampling
    bias = sorted(sampling.logit_bias.items(), key=lambda item: (-item[1], item[0]))
    return Row(
        stream=rng.stream(sampling.seed, new.choice),
        prompt_ids=new.prompt_ids,
        min_tokens=sampling.min_tokens,
        held_back=frozenset(new.eos_ids) | frozenset(sampling.stop_token_ids),
        banned=frozenset(token for token, value in bias if value <= -_CERTAIN),
        forced=[token for token, value in bias if value >= _CERTAIN],
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )
