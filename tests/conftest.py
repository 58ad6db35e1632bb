"""Without a GPU the kernels run in Triton's interpreter, which Triton chooses as it is imported.

It is at the root because whatever is collected first may import Triton, as the tests of models/ do by way of
transformers' models. A conftest.py in the kernels' own folder would come too late for them.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
