"""Elsewhere: how much of the machine was used by others while something was measured. Above some 5 %: measure again."""

from __future__ import annotations

import os
import time

import psutil


class Elsewhere:
    """Begins now. What counts as ours: this process and all of its children that have ended when `share` is asked."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._busy_s = self._busy()
        self._ours_s = self._ours()

    def share(self) -> float:
        """Share of all cores' time that others used since the beginning."""
        seconds = (time.monotonic() - self._began_s) * (psutil.cpu_count() or 1)
        others = (self._busy() - self._busy_s) - (self._ours() - self._ours_s)
        return max(0.0, others / max(1e-9, seconds))

    @staticmethod
    def _busy() -> float:
        times = psutil.cpu_times()
        return float(times.user + times.system + times.nice)

    @staticmethod
    def _ours() -> float:
        times = os.times()
        return times.user + times.system + times.children_user + times.children_system
