"""Fixtures of the kernels' tests."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
