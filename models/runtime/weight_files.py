"""Weight files: the safetensors of a checkpoint folder, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

NAMED = 5  # tensors named in an error


def tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, function that reads the tensor) of every tensor in the folder's files."""
    for path in _files(folder):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, lambda name=name, file=file: file.get_tensor(name)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # the library's own kind, for a malformed file
                raise
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from None


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{index} is not a valid index of safetensors files") from None
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names files outside of the folder: {some(outside)}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks the weight files {some(missing)}")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    return files


def some(names: list[str]) -> str:
    """The first few of many names, for an error."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
