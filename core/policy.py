"""Policy: who comes first, who gives way, how much prefill rides in a step. Pure functions.

Pacing decides throughput and latency more than any kernel does: a step is filled up to the point where its matrix
products turn from memory-bound to compute-bound, prompts are spread over steps, and the share of prefill grows with
the queue.
"""

from __future__ import annotations

from collections.abc import Iterable

from core.request import Sequence

MIN_CHUNK = 32  # a prompt never waits for ever behind a full house of decodes
QUEUE_STEPS = 16  # the backlog of prompt tokens is to be worked off within this many steps


def order(priority: int, arrival: int, choice: int) -> tuple[int, int, int]:
    """Sort key of waiting sequences: lower priority value first, then first come, first served."""
    return (priority, arrival, choice)


def prefill_budget(num_decodes: int, backlog_tokens: int, ideal_step_tokens: int, max_step_tokens: int) -> int:
    """Prompt tokens that may ride in a step with `num_decodes` decoding sequences.

    Without decodes nobody's inter-token time is at stake: the step is filled to the brim.
    """
    room = max_step_tokens - num_decodes
    if num_decodes == 0:
        return room
    budget = max(ideal_step_tokens - num_decodes, backlog_tokens // QUEUE_STEPS, MIN_CHUNK)
    return max(0, min(budget, room))


def victim(running: Iterable[Sequence]) -> Sequence:
    """The sequence whose preemption costs least: least important, then fewest tokens to compute again, then latest."""
    return max(running, key=lambda s: (s.order[0], -s.num_scheduled, s.order))
