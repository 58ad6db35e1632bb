"""Fixtures: the doors over a fake tokenizer, shared by a module's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.serving import Doors, FakeTokenizer, doors


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: socket names may have some 100 characters."""
    with tempfile.TemporaryDirectory(prefix="qt-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Doors, FakeTokenizer]]:
    with tempfile.TemporaryDirectory(prefix="qt-") as name, doors(Path(name)) as running:
        yield running


@pytest.fixture(scope="module")
def url(pair: tuple[Doors, FakeTokenizer]) -> str:
    return pair[0].url


@pytest.fixture
def tokenizer(pair: tuple[Doors, FakeTokenizer]) -> FakeTokenizer:
    return pair[1]
