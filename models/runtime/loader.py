"""Loader: a checkpoint folder to a model. Tensors are streamed one by one; each weight knows its slots.

Every tensor of the checkpoint must have a place, and every place a tensor: leftovers and gaps are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from core.errors import QuireError
from core.model_info import read_json
from hw.backend import Backend
from hw.comm import Comm
from hw.quant.scheme import make_scheme
from models.layers.decoder import Decoder
from models.layers.parts import Parts
from models.runtime import registry

LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # old files carry these; they follow from the config
NAMED = 5  # tensors named in an error


def load_model(
    folder: Path,
    backend: Backend,
    comm: Comm,
    *,
    dtype: torch.dtype,
    quantization: str = "none",
    load_format: str = "auto",
    num_positions: int,
    seed: int = 0,
) -> Decoder:
    """Build the model of a checkpoint and load this rank's share of its weights.

    Args:
        num_positions: longest sequence served.
        seed: of random weights (load_format "dummy").

    Raises:
        QuireError model_invalid: in one sentence.
    """
    config = read_json(folder / "config.json")
    module = registry.find(config)
    schemes = backend.capabilities.schemes
    parts = Parts(backend, comm, make_scheme(quantization, schemes), make_scheme("none", schemes), dtype)
    try:
        model: Decoder = module.Model(module.config(config), parts, num_positions)
        if load_format == "dummy":
            generator = torch.Generator(backend.device).manual_seed(seed)
            for weight in parts.weights.values():
                weight.fill(generator)
        else:
            _load(folder, parts, module.WEIGHTS, bool(config.get("tie_word_embeddings")))
    except ValueError as error:
        raise QuireError("model_invalid", str(error), "model") from None
    return model


def num_bytes(model: Decoder) -> int:
    """Bytes of this rank's weights."""
    return sum(weight.num_bytes for weight in model.parts.weights.values())


def _load(folder: Path, parts: Parts, table: dict[str, tuple[str, str]], tied: bool) -> None:
    leftovers = []
    for name, tensor in _tensors(folder):
        pattern = LAYER_INDEX.sub("{i}", name, count=1)
        weight_name, slot = table.get(pattern, ("", ""))
        index = LAYER_INDEX.search(name)
        weight = parts.weights.get(weight_name.replace("{i}", index.group() if index else ""))
        if weight is not None:
            weight.load(slot, tensor())
        elif not (IGNORED.search(name) or (tied and name == "lm_head.weight")):
            leftovers.append(name)
    if leftovers:
        raise ValueError(f"{folder} has {len(leftovers)} tensors that the model has no place for: {_some(leftovers)}")
    gaps = [f"{name} {slot}".strip() for name, weight in parts.weights.items() for slot in weight.missing()]
    if gaps:
        raise ValueError(f"{folder} lacks {len(gaps)} weights of the model: {_some(gaps)}")


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
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
            raise ValueError(f"{index} names files outside of the folder: {_some(outside)}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks the weight files {_some(missing)}")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors")
    return files


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
