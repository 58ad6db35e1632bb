"""Machine: this process is seen, a dead one is left out."""

from __future__ import annotations

import os

from tools.machine import Machine


def test_own_process_is_seen_and_a_dead_one_is_not() -> None:
    found = Machine().processes({"supervisor": os.getpid(), "api-0": 2**22 + 1}, {"supervisor": 2})
    assert list(found) == ["supervisor"]
    assert found["supervisor"].memory_bytes > 2**20
    assert found["supervisor"].cpu_s > 0
    assert found["supervisor"].restarts == 2
