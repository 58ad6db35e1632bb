"""Sampler: the sampling state of every row, and SampleInputs for those that draw a token in a step."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch

from core.grammar_rows import Allowed
from core.messages import NewSequence
from hw import rng
from hw.ops import SampleInputs


class Column(IntEnum):
    """Where a float parameter stands in the table; the order of `unbind`."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    PRESENCE = 3
    FREQUENCY = 4
    REPETITION = 5


# Of which rows a step must know, as bits: so that a step looks once whether any row needs a stage.
_RANDOM, _TRUNCATION, _PENALTY, _BIAS = 1, 2, 4, 8


class Sampler:
    """Parameters by row, on the host: a step's few numbers per row travel to the device with its other inputs.

    Args:
        token_ids: the state table [rows, max_len] on the device, for penalties.
    """

    def __init__(self, num_rows: int, vocab_size: int, token_ids: torch.Tensor) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size
        self._floats = np.zeros((len(Column), num_rows), dtype=np.float32)
        self._top_k = np.zeros(num_rows, dtype=np.int32)
        self._prompt_lens = np.zeros(num_rows, dtype=np.int32)
        self._streams = np.zeros(num_rows, dtype=np.uint64)
        self._flags = np.zeros(num_rows, dtype=np.int32)
        self._logprobs = np.full(num_rows, -1, dtype=np.int32)
        self._prompt_logprobs = np.full(num_rows, -1, dtype=np.int32)
        self._bias: dict[int, dict[int, float]] = {}
        self._bans: dict[int, tuple[int, list[int]]] = {}  # row -> (min_tokens, ids banned below it)

    def begin(self, new: NewSequence) -> None:
        """A sequence takes a row."""
        sampling, row = new.sampling, new.row
        random = sampling.temperature > 0
        self._floats[:, row] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.repetition_penalty,
        )
        self._top_k[row] = min(sampling.top_k, self._vocab_size)
        self._prompt_lens[row] = len(new.prompt_ids)
        self._streams[row] = rng.stream(sampling.seed, new.choice)
        self._logprobs[row] = -1 if sampling.logprobs is None else sampling.logprobs
        self._prompt_logprobs[row] = -1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs
        bias = {token: value for token, value in sampling.logit_bias.items() if 0 <= token < self._vocab_size}
        # Of a constrained row, ends that are held back are missing from its grammar's mask.
        early = 0 if sampling.structured_outputs is not None else sampling.min_tokens
        banned = [t for t in dict.fromkeys((*new.eos_ids, *sampling.stop_token_ids)) if 0 <= t < self._vocab_size]
        self._bias[row] = bias
        self._bans[row] = (early if banned else 0, banned)
        truncates = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        penalises = (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) != (0, 0, 1)
        self._flags[row] = (
            (_RANDOM if random else 0)
            | (_TRUNCATION if random and truncates else 0)
            | (_PENALTY if penalises else 0)
            | (_BIAS if bias or self._bans[row][0] else 0)
        )

    def num_logprobs(self, row: int) -> int | None:
        """How many alternatives the row's tokens come with; None: no log-probabilities."""
        wanted = int(self._logprobs[row])
        return None if wanted < 0 else min(wanted, self._vocab_size)

    def num_prompt_logprobs(self, row: int) -> int:
        """How many alternatives the row's prompt log-probabilities come with."""
        return min(max(0, int(self._prompt_logprobs[row])), self._vocab_size)

    def inputs(self, rows: list[int], lens: list[int], allowed: Allowed | None = None) -> SampleInputs:
        """SampleInputs of `rows`, whose sequences are `lens` tokens long before the draw, and may draw `allowed`."""
        device = self._token_ids.device
        index = np.array(rows, dtype=np.int32)
        lengths = np.array(lens, dtype=np.int32)
        prompt_lens = self._prompt_lens[index]
        flags = int(np.bitwise_or.reduce(self._flags[index]))
        integers = np.zeros((6, len(rows)), dtype=np.int32)
        integers[0] = self._top_k[index]
        if flags & _RANDOM:
            integers[1], integers[2] = rng.keys(self._streams[index], lengths - prompt_lens)
        integers[3], integers[4], integers[5] = index, prompt_lens, lengths
        floats = torch.from_numpy(self._floats[:, index]).to(device, non_blocking=True).unbind(0)
        top_k, key0, key1, state_rows, prompts, lens_ = (
            torch.from_numpy(integers).to(device, non_blocking=True).unbind(0)
        )
        bias_ids, bias_values = _NO_BIAS
        if flags & _BIAS:
            bias_ids, bias_values = self._bias_of(rows, (lengths - prompt_lens).tolist())
        masks = allowed_rows = None
        if allowed is not None:
            masks = torch.from_numpy(allowed.masks).to(device, non_blocking=True)
            allowed_rows = torch.tensor(list(allowed.rows), dtype=torch.int32).to(device, non_blocking=True)
        wanted = int(self._logprobs[index].max())
        return SampleInputs(
            temperature=floats[Column.TEMPERATURE],
            top_k=top_k,
            top_p=floats[Column.TOP_P],
            min_p=floats[Column.MIN_P],
            presence=floats[Column.PRESENCE],
            frequency=floats[Column.FREQUENCY],
            repetition=floats[Column.REPETITION],
            key0=key0,
            key1=key1,
            token_ids=self._token_ids,
            state_rows=state_rows,
            prompt_lens=prompts,
            lens=lens_,
            bias_ids=bias_ids.to(device, non_blocking=True),
            bias_values=bias_values.to(device, non_blocking=True),
            any_random=bool(flags & _RANDOM),
            any_truncation=bool(flags & _TRUNCATION),
            any_penalty=bool(flags & _PENALTY),
            any_bias=bias_ids.shape[1] > 0,
            num_logprobs=None if wanted < 0 else min(wanted, self._vocab_size),
            allowed=masks,
            allowed_rows=allowed_rows,
        )

    def _bias_of(self, rows: list[int], num_outputs: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias entries [m, k] of the rows, whose end and stop ids are banned while they are below min_tokens."""
        entries: list[list[tuple[int, float]]] = []
        for row, done in zip(rows, num_outputs, strict=True):
            min_tokens, banned = self._bans[row]
            bans = [(token, -math.inf) for token in banned] if done < min_tokens else []
            entries.append([*self._bias[row].items(), *bans])
        width = max(map(len, entries))
        ids = torch.full((len(rows), width), -1, dtype=torch.int32)
        values = torch.zeros((len(rows), width))
        for i, line in enumerate(entries):
            if line:
                ids[i, : len(line)] = torch.tensor([token for token, _ in line], dtype=torch.int32)
                values[i, : len(line)] = torch.tensor([value for _, value in line])
        return ids, values


_NO_BIAS = (torch.zeros((1, 0), dtype=torch.int32), torch.zeros((1, 0)))
