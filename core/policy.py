"""Policy: who comes first, who gives way, how much prefill rides in a step. Pure functions.

Pacing decides throughput and latency more than any kernel does: a step is filled up to the point where its matrix
products turn from memory-bound to compute-bound, prompts are spread over steps, and the share of prefill grows with
the queue.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from core.request import Sequence

MIN_CHUNK = 32  # a prompt never waits for ever behind a full house of decodes
EXPECTED_OUTPUT = 256  # tokens that an answer is thought to take, whatever max_tokens allows, until its end is known
QUEUE_STEPS = 64  # the backlog of prompt tokens shrinks by this share of it in every step
MEMORY = 64  # ended sequences over which Demand takes its means


def order(priority: int, arrival: int, choice: int) -> tuple[int, int, int]:
    """Sort key of sequences that have begun: lower priority value first, then first come, first served."""
    return (priority, arrival, choice)


def expected_output(max_output: int) -> int:
    """Output tokens that a sequence's tenant is charged when it begins."""
    return min(max_output, EXPECTED_OUTPUT)


@dataclass(slots=True)
class Demand:
    """How many prompt tokens are computed for each token that is generated: running means over ended sequences."""

    prompt: float = 0.0
    output: float = 0.0
    seen: int = 0

    def observe(self, prompt_tokens: int, output_tokens: int) -> None:
        """A sequence has ended, for which so many tokens were computed (not found in the cache) and generated."""
        self.seen = min(self.seen + 1, MEMORY)
        self.prompt += (prompt_tokens - self.prompt) / self.seen
        self.output += (output_tokens - self.output) / self.seen

    @property
    def ratio(self) -> float:
        """Prompt tokens per generated token; 0 before anything has ended."""
        return self.prompt / max(1.0, self.output)


def prefill_budget(
    num_decodes: int,
    backlog_tokens: int,
    ideal_step_tokens: int,
    max_step_tokens: int,
    ratio: float = 0.0,
    step_sizes: tuple[int, ...] = (),
) -> int:
    """Prompt tokens that may ride in a step with `num_decodes` decoding sequences.

    `ratio` is that of Demand: as many prompt tokens for each decode keep the house full. A crowd that arrives at once
    is thereby spread over steps, and so ends spread: prompts then ride along with decodes for ever after, at a fraction
    of what they cost alone. Only a backlog far larger than that takes more of each step. What would be padding up to
    the next of `step_sizes` is filled with prompt tokens too.
    Without decodes nobody's inter-token time is at stake: the step is filled to the brim.
    """
    room = max_step_tokens - num_decodes
    if num_decodes == 0:
        return room
    balance = math.ceil(num_decodes * ratio)
    budget = max(ideal_step_tokens - num_decodes, balance, backlog_tokens // QUEUE_STEPS, MIN_CHUNK)
    at = bisect_left(step_sizes, num_decodes + budget)
    if at < len(step_sizes):
        budget = step_sizes[at] - num_decodes
    return max(0, min(budget, room))


def victim(running: Iterable[Sequence]) -> Sequence:
    """The sequence whose preemption costs least: least important, then fewest tokens to compute again, then latest.

    Importance counts among the requests of one API key only: it is the key whose sequence is the cheapest of all.
    """
    candidates = list(running)
    cheapest = max(candidates, key=lambda s: (-s.num_scheduled, s.order[1:]))
    tenant = cheapest.request.submit.tenant
    rivals = (s for s in candidates if s.request.submit.tenant == tenant)
    return max(rivals, key=lambda s: (s.order[0], -s.num_scheduled, s.order))
