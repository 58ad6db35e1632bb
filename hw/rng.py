"""RNG keys: what makes a drawn token depend on (seed, choice, position, purpose) and on nothing else.

numpy only, so that the null device needs no torch. The mixing function is splitmix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = 0xBF58476D1CE4E5B9
_FACTOR_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """What the random bits are for; speculation will add its own (accept, residual)."""

    SAMPLE = 0


_PURPOSES = 8  # room for purposes between two positions


def splitmix64(x: int) -> int:
    """One output of splitmix64 at state x."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _FACTOR_1) & _MASK
    x = ((x ^ (x >> 27)) * _FACTOR_2) & _MASK
    return x ^ (x >> 31)


def stream(seed: int | None, choice: int) -> int:
    """The 64-bit name of a sequence's random stream; any integer is a seed."""
    return splitmix64(splitmix64((seed or 0) & _MASK) ^ choice)


def key(stream: int, position: int, purpose: Purpose = Purpose.SAMPLE) -> int:
    """The 64-bit key of a position, which counts output tokens only."""
    return splitmix64((stream + (position * _PURPOSES + purpose) * _GOLDEN) & _MASK)


def keys(
    streams: NDArray[np.uint64], positions: NDArray[Any], purpose: Purpose = Purpose.SAMPLE
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`key` for many rows at once: the low and the high half of each as int32."""
    x = streams + (positions.astype(np.uint64) * np.uint64(_PURPOSES) + np.uint64(purpose)) * np.uint64(_GOLDEN)
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FACTOR_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_FACTOR_2)
    halves = (x ^ (x >> np.uint64(31))).view(np.int32).reshape(-1, 2)
    return halves[:, 0], halves[:, 1]
