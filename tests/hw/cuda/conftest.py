"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before a kernel is defined."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    """Where the kernels under test run."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
