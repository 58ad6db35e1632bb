"""GrammarRows: the grammar of every worker row that has one: where its sequence stands, and what may follow.

Compiling, and replaying what a preempted or resumed sequence had, happen in a thread while the device computes the
prompt; only drawing a row's token waits for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import QuireError
from core.grammar import Grammars, Matcher
from core.messages import NewSequence, Scheduled
from quire import StructuredOutputs

MAX_COMPILED = 64  # grammars kept; each takes up to some megabytes

Mask = np.ndarray[Any, np.dtype[np.int32]]


class GrammarRow:
    """One sequence. `pending`: tokens drawn that `take` has not seen. `error`: field and reason if it cannot go on."""

    def __init__(self, matcher: Future[Matcher], wanted: StructuredOutputs, new: NewSequence, vocab_size: int) -> None:
        sampling = new.sampling
        self._source = wanted.source
        self.pending = 0
        self.error = ""
        self._future = matcher
        self._matcher: Matcher | None = None
        self._num_outputs = len(new.output_ids)
        self._min_tokens = sampling.min_tokens
        self._always = _mask(new.eos_ids if sampling.ignore_eos else [], vocab_size)
        self._early = self._always | _mask([*new.eos_ids, *sampling.stop_token_ids], vocab_size)

    def allowed(self) -> Mask:
        """[ceil(vocab / 32)] int32: what may come next; everything once there is an error.

        Ends that min_tokens or ignore_eos hold back are left out, unless nothing else is allowed: the grammar wins.
        """
        if self._matcher is None and not self.error:
            failure = self._future.exception()  # waits; whatever went wrong is this row's affair alone
            if failure is None:
                self._matcher = self._future.result()
            else:
                self.error = str(failure) or type(failure).__name__
        if self._matcher is not None and not self.error:
            mask = self._matcher.allowed()
            if not self._failed(self._matcher):
                held_back = mask & ~(self._early if self._num_outputs < self._min_tokens else self._always)
                return held_back if held_back.any() else mask
        return np.full_like(self._early, -1)

    def take(self, token_id: int) -> str:
        """Go on by a token that was drawn; returns `error`. What comes after the end changes nothing."""
        self.pending -= 1
        self._num_outputs += 1
        if self._matcher is not None and not self.error and not self._matcher.ended:
            self._matcher.take([token_id])
            self._failed(self._matcher)
        return self.error

    def _failed(self, matcher: Matcher) -> bool:
        if reason := matcher.error:
            self.error = f"{self._source}: {reason}"
        return bool(reason)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the constrained ones of some rows may draw: masks [k, words] int32, and who they are, by index."""

    masks: Mask
    rows: dict[int, GrammarRow]


class GrammarRows:
    """All constrained rows of a worker, by row.

    Args:
        load: makes the Grammars of the model's vocabulary; called once, in the thread.
    """

    def __init__(self, vocab_size: int, load: Callable[[], Grammars]) -> None:
        self._vocab_size = vocab_size
        self._load = load
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._rows: dict[int, GrammarRow] = {}
        self._grammars: Grammars | None = None  # this and what follows: the thread's own
        self._compiled: OrderedDict[StructuredOutputs, Matcher] = OrderedDict()

    def prepare(self) -> None:
        """Read the vocabulary now, in the thread, so that the first constrained request does not wait for it."""
        self._thread.submit(self._ready)

    def begin(self, new: NewSequence) -> None:
        """A sequence takes a row."""
        wanted = new.sampling.structured_outputs
        if wanted is None:
            self._rows.pop(new.row, None)
            return
        matcher = self._thread.submit(self._matcher, wanted, new.output_ids)
        self._rows[new.row] = GrammarRow(matcher, wanted, new, self._vocab_size)

    def release(self, rows: list[int]) -> None:
        """Sequences leave their rows. Tokens of theirs that are under way still reach them."""
        for row in rows:
            self._rows.pop(row, None)

    def clear(self) -> None:
        """All sequences leave."""
        self._rows.clear()

    def pending(self, scheduled: list[Scheduled]) -> bool:
        """Whether a constrained row draws in this step whose last token is not known yet."""
        if not self._rows:
            return False
        rows = (self._rows.get(s.row) for s in scheduled if s.sample)
        return any(row is not None and row.pending > 0 for row in rows)

    def allowed(self, rows: list[int]) -> Allowed | None:
        """For `rows`, each of which now draws a token and is told by `take`; None when none of them is constrained."""
        if not self._rows:
            return None
        found = {i: self._rows[row] for i, row in enumerate(rows) if row in self._rows}
        if not found:
            return None
        masks = np.stack([row.allowed() for row in found.values()])
        for row in found.values():
            row.pending += 1
        return Allowed(masks, found)

    def _ready(self) -> Grammars:
        if self._grammars is None:
            self._grammars = self._load()
        return self._grammars

    def _matcher(self, wanted: StructuredOutputs, output_ids: list[int]) -> Matcher:
        """A Matcher after `output_ids`. Runs in the thread. Raises QuireError."""
        compiled = self._compiled.get(wanted)
        if compiled is None:
            compiled = self._compiled[wanted] = self._ready().compile(wanted)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(wanted)
        matcher = compiled.copy()
        if not matcher.take(output_ids):
            raise QuireError("invalid_grammar", f"{wanted.source}: {matcher.error}", wanted.source)
        return matcher


def _mask(ids: list[int], vocab_size: int) -> Mask:
    """The packed mask of some ids."""
    mask = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token_id in ids:
        if 0 <= token_id < vocab_size:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return mask.view(np.int32)
