"""Fixtures: servers of a test's own, and the draw of its kill points."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.e2e.serving import Server, serving


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., AbstractContextManager[Server]]:
    """`with serve("--flag", …) as server`: a server of the test's own."""
    return lambda *args: serving(tmp_path, *args)


@pytest.fixture
def draw(pytestconfig: pytest.Config) -> random.Random:
    """Kill points; the seed is printed, and pytest shows it with a failure."""
    seed = time.time_ns() % 1_000_000
    print(f"kill points are drawn with seed {seed}")
    return random.Random(seed)
