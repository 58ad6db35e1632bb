"""Comm: what the ranks of one model say to each other. One rank says nothing; several speak Gloo (CPU) or NCCL."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist


class Comm:
    """A single rank: every collective is the identity. `rank` counts from 0 to `size` - 1."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [m, n], equal shapes on all ranks -> [m, size * n], the ranks' columns in order."""
        return x

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Rank `source`'s x on every rank, in place."""
        return x

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the group."""


class TorchComm(Comm):
    """Several ranks over torch.distributed. They meet at a file in `folder`: there is no port to choose or to guard.

    Args:
        backend: "gloo" or "nccl".
        folder: a private folder that all ranks see; `epoch` must differ for each start of the group in it, since a
            rendezvous file serves once.

    Raises:
        RuntimeError: a rank did not come within `timeout_s`, or died while the others waited for it.
    """

    def __init__(
        self, backend: str, rank: int, size: int, folder: Path, *, epoch: str = "0", timeout_s: float = 300.0
    ) -> None:
        super().__init__(rank, size)
        store = dist.FileStore(str(folder / f"ranks-{epoch}"), size)  # type: ignore[attr-defined]
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        dist.broadcast(x, source)
        return x

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()
