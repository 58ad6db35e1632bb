"""The import arrows of the architecture, read from the source; and who may import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("core", "hw", "models", "api", "tools", "quire", "tests")
# folder -> which of ours it may import besides itself
ALLOWED = {
    "core": {"quire"},
    "hw": {"core", "quire"},
    "models": {"core", "hw", "quire"},
    "api": {"core", "quire"},
    "tools": {"core", "hw", "models", "api", "quire"},
    "quire": set(),
}
TORCH_FREE = ("core", "api", "quire")


def sources() -> list[Path]:
    return [
        path for name in ALLOWED for path in ([ROOT / f"{name}.py"] if name == "quire" else (ROOT / name).rglob("*.py"))
    ]


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    folder = folder_of(path)
    wrong = (imports(path) & set(OURS)) - ALLOWED[folder] - {folder}
    assert not wrong, f"{folder} must not import {wrong}"
    if folder in TORCH_FREE:
        assert not imports(path) & {"torch", "triton", "transformers"}


def test_quire_py_needs_only_msgspec_and_zmq() -> None:
    names = imports(ROOT / "quire.py") - set(sys.stdlib_module_names)
    assert names == {"msgspec", "zmq"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("api.server", {"torch", "transformers", "tokenizers", "triton", "llguidance"}),
        ("core.engine", {"torch", "numpy", "tokenizers", "starlette", "llguidance"}),
        ("core.tokenizer", {"torch", "transformers", "starlette"}),
        ("tools.cli", {"torch", "starlette", "zmq", "numpy", "msgspec"}),
        ("models.runtime.worker", {"torch", "transformers", "starlette"}),
        ("models.llama", {"torch"}),
        ("models.mistral", {"torch"}),
        ("models.qwen2", {"torch"}),
        ("models.qwen3", {"torch"}),
        ("tools.plan.__main__", {"torch", "transformers", "starlette", "huggingface_hub"}),
        ("tools.doctor.__main__", {"torch", "transformers", "starlette"}),
    ],
)
def test_what_a_process_loads(module: str, forbidden: set[str]) -> None:
    code = f"import {module}, sys; print(*{sorted(forbidden)!r} & sys.modules.keys())".replace(
        f"{sorted(forbidden)!r} &", f"set({sorted(forbidden)!r}) &"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_nobody_else_owns_our_names() -> None:
    owners = metadata.packages_distributions()
    for name in ("core", "hw", "models", "api", "tools", "quire"):
        assert set(owners.get(name, ["quire"])) == {"quire"}
