"""Comm: one rank says nothing; two processes over Gloo meet at a file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from hw.comm import Comm

RANK = """
import sys
from pathlib import Path
import torch
from hw.comm import TorchComm
rank, folder, epoch = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
comm = TorchComm("gloo", rank, 2, folder, epoch=epoch, timeout_s=60)
x = torch.tensor([[1.0, 2.0]]) * (rank + 1)
print(comm.all_gather(x).tolist(), comm.all_reduce(x.clone()).tolist(), comm.broadcast(x.clone(), 1).tolist())
comm.barrier()
comm.close()
"""


def test_two_ranks_and_a_second_start_in_the_same_folder(tmp_path: Path) -> None:
    for epoch in ("a", "b"):
        command = [sys.executable, "-c", RANK]
        ranks = [
            subprocess.Popen([*command, str(rank), str(tmp_path), epoch], stdout=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        said = [rank.communicate(timeout=90)[0].strip() for rank in ranks]
        assert said == ["[[1.0, 2.0, 2.0, 4.0]] [[3.0, 6.0]] [[2.0, 4.0]]"] * 2


def test_one_rank_is_the_identity() -> None:
    x = torch.randn(2, 3)
    comm = Comm()
    assert (comm.rank, comm.size) == (0, 1)
    assert all(torch.equal(got, x) for got in (comm.all_reduce(x), comm.all_gather(x), comm.broadcast(x)))
