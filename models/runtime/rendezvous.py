"""Rendezvous: how the ranks of one start of a group find each other in the run folder, and never an earlier start's.

Rank 0 names the start after itself (pid and birth) in a file. A name whose process is dead is of an earlier start: the
supervisor ends all ranks of a group before it starts any of them again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

FILE = "ranks-start"
POLL_S = 0.02


def meet(folder: Path, rank: int, timeout_s: float = 120.0, keep_waiting: Callable[[], bool] = lambda: True) -> str:
    """The name of this start, equal on all ranks and different for each start.

    Raises:
        TimeoutError: rank 0 did not show itself, or `keep_waiting` turned false.
    """
    path = folder / FILE
    if rank == 0:
        name = _name(os.getpid())
        draft = folder / f"{FILE}.{os.getpid()}"
        draft.write_text(name)
        draft.rename(path)  # readers see all of it or nothing
        return name
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and keep_waiting():
        name = path.read_text() if path.exists() else ""
        if name and _lives(name):
            return name
        time.sleep(POLL_S)
    raise TimeoutError(f"rank {rank} waited for rank 0 for {timeout_s:.0f} s")


def _name(pid: int) -> str:
    return f"{pid}-{int(psutil.Process(pid).create_time() * 1000)}"


def _lives(name: str) -> bool:
    try:
        return _name(int(name.partition("-")[0])) == name
    except (psutil.Error, ValueError):
        return False
