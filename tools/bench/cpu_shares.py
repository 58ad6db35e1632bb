"""CpuShares: how much of a core each process of a server used between two moments. Local servers only."""

from __future__ import annotations

import psutil

import quire


class CpuShares:
    """Reads the process tree below `pid` now; `shares` says what it used since."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._before = self._seconds()

    @staticmethod
    def of_url(url: str) -> CpuShares | None:
        """For the Quire server of this user that listens at `url`; None when it is none."""
        for server in quire.find_servers():
            if str(server.get("url", "")).rstrip("/") == url.rstrip("/"):
                return CpuShares(server["pid"])
        return None

    def shares(self, seconds: float) -> dict[str, float]:
        """Process name -> CPU seconds since the beginning per second; 1.0 is one core.

        `seconds`: those in which there was load. An idle server uses nothing worth counting, and the clients' start
        and the making of prompts are no part of the measurement.
        """
        now = self._seconds()
        return {name: max(0.0, used - self._before.get(name, 0.0)) / seconds for name, used in now.items()}

    def _seconds(self) -> dict[str, float]:
        used: dict[str, float] = {}
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                name = self._name(process)
                used[name] = used.get(name, 0.0) + times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return used

    def _name(self, process: psutil.Process) -> str:
        if process.pid == self._root.pid:
            return "supervisor"
        title = " ".join(process.cmdline()).strip()
        return title.removeprefix("quire: ") if title.startswith("quire: ") else process.name()
