"""Sharing: which part of a whole each tensor-parallel rank has."""

from __future__ import annotations


def share(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    """A rank's [start, count) of `total` equal parts. Raises ValueError when they cannot be shared equally."""
    if total % size:
        raise ValueError(f"{what}: {total} cannot be divided among {size} ranks; lower --tensor-parallel-size")
    return rank * (total // size), total // size


def share_kv_heads(total: int, rank: int, size: int, what: str) -> tuple[int, int]:
    """A rank's [start, count) of the K/V heads, repeated when there are fewer than ranks. Raises ValueError."""
    if total >= size:
        return share(total, rank, size, f"{what} K/V heads")
    if size % total:
        raise ValueError(f"{what}: {total} K/V heads cannot be repeated on {size} ranks")
    return rank * total // size, 1
