"""models/runtime/rendezvous.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models.runtime.rendezvous import FILE, meet

RANK_0 = "import sys, pathlib, models.runtime.rendezvous as r; print(r.meet(pathlib.Path(sys.argv[1]), 0), flush=True)"


def test_partners_learn_the_name_of_a_living_rank_0(tmp_path: Path) -> None:
    code = RANK_0 + "; sys.stdin.read()"
    command = [sys.executable, "-P", "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rank_0:
        assert rank_0.stdout is not None
        name = rank_0.stdout.readline().strip()
        assert meet(tmp_path, 1, 5.0) == name
        rank_0.communicate("")


def test_the_name_of_an_earlier_start_is_not_taken(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-P", "-c", RANK_0, str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / FILE).exists()
    with pytest.raises(TimeoutError):
        meet(tmp_path, 1, 0.2)
