"""Request: what a client asked. Sequence: one token stream of it (n > 1 gives several)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum

from core.blocks import BlockTable, chain_key
from core.fair_queue import Place
from core.messages import Submit


class State(Enum):
    """Where a sequence is. PREEMPTED waits like WAITING, but has run before."""

    FORKING = "forking"  # waits for choice 0 to compute the prompt that they share
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Sequence:
    """One choice. Prompt ids and output ids stay apart: penalties, limits and the RNG count output tokens only.

    num_scheduled: positions whose KV is computed or in flight. num_computed: those whose step has been answered.
    pending: tokens that steps in flight will add. in_flight: steps in flight that hold this sequence. era: counts
    preemptions, so that the answer to a step from before one is told apart. charged: output tokens that its tenant was
    charged in advance.
    """

    __slots__ = (
        "capacity", "charged", "choice", "era", "highest", "in_flight", "keys", "max_output", "num_computed",
        "num_prompt", "num_scheduled", "order", "output_ids", "pending", "prompt_ids", "prompt_logprobs_done",
        "publish_at", "published", "request", "row", "state", "tables",
    )  # fmt: skip

    def __init__(self, request: Request, choice: int, output_ids: list[int], order: tuple[int, int, int]) -> None:
        self.request = request
        self.choice = choice
        self.order = order
        self.prompt_ids = request.prompt_ids
        self.num_prompt = len(request.prompt_ids)
        self.output_ids = output_ids
        self.max_output = request.max_output
        self.state = State.WAITING
        self.row = -1
        self.tables: list[BlockTable] = []
        self.capacity = 0  # positions that the tables hold
        self.keys: list[bytes] = []  # hashes of full blocks whose tokens are known
        self.published = 0  # blocks offered to the prefix cache
        self.publish_at = 0  # computed positions from which another block can be offered
        self.num_scheduled = 0
        self.num_computed = 0
        self.highest = 0  # most positions ever scheduled: below it, computing is computing again
        self.pending = 0
        self.in_flight = 0
        self.era = 0
        self.prompt_logprobs_done = 0
        self.charged = 0

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def num_known(self) -> int:
        """Tokens whose ids the scheduler knows."""
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> Seq[int]:
        """Known token ids at positions [start, stop)."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        if start >= split:
            return self.output_ids[start - split : stop - split]
        return self.prompt_ids[start:] + self.output_ids[: stop - split]

    def block_keys(self, block_size: int, num_blocks: int) -> list[bytes]:
        """The first `num_blocks` hashes of the chain, extended as needed."""
        keys = self.keys
        while len(keys) < num_blocks:
            start = len(keys) * block_size
            parent = keys[-1] if keys else self.request.root_key
            keys.append(chain_key(parent, self.tokens(start, start + block_size)))
        return keys[:num_blocks]


@dataclass(slots=True)
class Request:
    """`max_output`: most tokens a choice may have. `ends`: ids that end a sequence. `unfinished`: choices under way.
    `begun`: a choice has run, so that the others need not wait for their turn, nor give way."""

    submit: Submit
    prompt_ids: list[int]
    root_key: bytes
    max_output: int
    ends: frozenset[int]
    sequences: list[Sequence] = field(default_factory=list)
    forks: list[Sequence] = field(default_factory=list)
    unfinished: int = 0
    cached_tokens: int | None = None
    begun: bool = False

    @property
    def place(self) -> Place:
        """Where it waits for its turn."""
        submit = self.submit
        return Place(submit.tenant, submit.user, submit.priority, len(self.prompt_ids))
