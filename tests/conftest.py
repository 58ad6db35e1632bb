"""Without a GPU the kernels run in Triton's interpreter, which Triton chooses as it is imported.

This file is the root of the tests because whatever is collected first may import Triton: transformers' models do, and so do
the tests of models/. A conftest.py of the kernels' own folder would come too late for them.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
