"""hw/cuda/precompile.py: what is compiled ahead is what the launches need; nothing hangs, nothing is left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget

from hw.backend import Capabilities
from hw.comm import Comm
from hw.cuda.precompile import start

FOLDER = Path(__file__).parent
SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 512,
    "intermediate_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        ("sm_90", ("fp8", "fp8")),
        ("sm_90", ("none", "auto")),
        pytest.param("gfx942", ("fp8", "fp8"), marks=pytest.mark.slow),
        pytest.param("sm_80", ("none", "auto"), marks=pytest.mark.slow),
    ],
)
def test_launches_find_all_of_their_kernels_and_no_more(
    tmp_path: Path, architecture: str, precision: tuple[str, str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[2])}
    environment.pop("TRITON_INTERPRET", None)
    program = [sys.executable, str(FOLDER / "precompile_only.py"), architecture]
    command = [*program, str(tmp_path / "cache"), str(tmp_path), *precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["missed"] == []
    assert facts["superfluous"] == []
    names = {line.split()[0] for line in facts["wanted"]}
    assert {"stage_kernel", "sample_part_kernel", "attention_decode_kernel", "rope_cache_kernel"} <= names
    assert ("fp8_linear_kernel" in names) == (precision[0] == "fp8")
    assert facts["counts"] == [len(facts["wanted"]), 0, 0]


def begin(trace: Any) -> Any:
    facts = Capabilities("cuda", "", ("bfloat16",), ("bfloat16",), ("none",), True, 16, 160, 1 << 30)
    return start(trace, facts, GPUTarget("cuda", 90, 32), True, Comm())


def ended(pid: int) -> bool:
    """Whether the child is gone and taken note of."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_error_in_a_trace_is_told_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    def trace(backend: Any, comm: Comm) -> None:
        raise ValueError("no such model")

    compiling = begin(trace)
    pid = compiling._pid
    assert compiling.wait() == (0, 0, 0)
    assert ended(pid)
    assert "no such model" in capfd.readouterr().err


def test_a_trace_that_hangs_is_given_up() -> None:
    compiling = begin(lambda backend, comm: time.sleep(600))
    pid = compiling._pid
    assert compiling.wait(timeout_s=0.5) == (0, 0, 0)
    assert ended(pid)
    compiling.close()  # again


def test_processes_die_with_the_one_that_started_them() -> None:
    code = (
        "import os, time\n"
        "from tests.hw.cuda.test_precompile import begin\n"
        "compiling = begin(lambda backend, comm: time.sleep(600))\n"
        "print(compiling._pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parents[2], stdout=subprocess.PIPE, text=True, check=True, timeout=60
    )
    pid = int(done.stdout)
    for _ in range(200):
        if ended(pid) or b"(zombie)" in Path(f"/proc/{pid}/status").read_bytes():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} lives on")
