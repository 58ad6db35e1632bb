"""Machine: what the supervisor sees of its processes, once a second at most."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil

from core.stats import ProcessFigures

FRESH_S = 1.0


class Machine:
    """Looks at processes by pid; one that is gone is left out."""

    def __init__(self) -> None:
        self._known: dict[int, psutil.Process] = {}
        self._found: dict[str, ProcessFigures] = {}
        self._looked_s = 0.0

    def processes(self, pids: Mapping[str, int], restarts: Mapping[str, int]) -> dict[str, ProcessFigures]:
        """Processor time and memory by name; at most FRESH_S old."""
        now = time.monotonic()
        if self._found and now - self._looked_s < FRESH_S:
            return self._found
        self._looked_s = now
        self._known = {pid: known for pid, known in self._known.items() if pid in pids.values()}
        self._found = {}
        for name, pid in pids.items():
            try:
                process = self._known.setdefault(pid, psutil.Process(pid))
                with process.oneshot():
                    times = process.cpu_times()
                    memory = process.memory_info().rss
            except psutil.Error:
                self._known.pop(pid, None)
                continue
            self._found[name] = ProcessFigures(pid, times.user + times.system, memory, restarts.get(name, 0))
        return self._found
