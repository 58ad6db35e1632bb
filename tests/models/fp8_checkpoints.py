"""Makes FP8 checkpoints of plain ones, in the spellings that are found in the wild, and their dequantised twins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

F8 = torch.float8_e4m3fn
LARGEST = 448.0
Quantised = tuple[torch.Tensor, torch.Tensor]


def per_tensor(weight: torch.Tensor) -> Quantised:
    """e4m3 values and a scalar scale."""
    scale = weight.abs().max() / LARGEST
    return (weight / scale).to(F8), scale


def per_channel(weight: torch.Tensor) -> Quantised:
    """e4m3 values and scales [n, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / LARGEST
    return (weight / scale).to(F8), scale


def per_block(size: int) -> Callable[[torch.Tensor], Quantised]:
    """e4m3 values and scales of square blocks, the last ones of which may be smaller."""

    def quantise(weight: torch.Tensor) -> Quantised:
        rows, columns = (-(-length // size) for length in weight.shape)
        scale, values = torch.empty(rows, columns), torch.empty(weight.shape, dtype=F8)
        for i in range(rows):
            for j in range(columns):
                here = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                scale[i, j] = weight[here].abs().max() / LARGEST
                values[here] = (weight[here] / scale[i, j]).to(F8)
        return values, scale

    return quantise


def plain(values: torch.Tensor, scale: torch.Tensor, size: int = 0) -> torch.Tensor:
    """The formula: each value times the scale of its tensor, row or block. One block after the other."""
    result = values.float()
    if not size:
        return result * scale
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            result[i * size : (i + 1) * size, j * size : (j + 1) * size] *= scale[i, j]
    return result


def group(strategy: str, dynamic: bool = True, targets: tuple[str, ...] = ("Linear",), **more: Any) -> dict[str, Any]:
    """One entry of compressed-tensors' config_groups."""
    inputs = {"num_bits": 8, "type": "float", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    return {"targets": list(targets), "weights": weights | more, "input_activations": inputs}


def compressed(ignore: tuple[str, ...] = ("lm_head",), **groups: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": list(ignore),
    }


def convert(
    folder: Path,
    settings: dict[str, Any],
    quantise: Callable[[torch.Tensor], Quantised],
    kept: tuple[str, ...],
    *,
    scale_name: str = "weight_scale",
    size: int = 0,
    input_name: str | None = None,
    apart: bool = False,
) -> tuple[Path, Path]:
    """(FP8 checkpoint, plain checkpoint of its dequantised weights).

    kept: ends of modules that stay plain. apart: scales in a file of their own that is read before the weights'.
    """
    weights, twin, scales = load_file(folder / "model.safetensors"), {}, {}
    for name, weight in list(weights.items()):
        module = name.removesuffix(".weight")
        twin[name] = weight
        if ("_proj.weight" not in name and name != "lm_head.weight") or module.endswith(kept):
            continue
        weights[name], scale = quantise(weight)
        twin[name] = plain(weights[name], scale, size)
        scales[f"{module}.{scale_name}"] = scale
        if input_name is not None:
            scales[f"{module}.{input_name}"] = torch.tensor(0.03)
    ready, dequantised = folder.with_name("ready"), folder.with_name("dequantised")
    for to, tensors in ((ready, weights), (dequantised, twin)):
        shutil.copytree(folder, to)
        config = json.loads((folder / "config.json").read_text())
        if to is ready:
            config["quantization_config"] = settings
            if apart:
                save_file(scales, to / "a.safetensors")
                (to / "model.safetensors").unlink()
                save_file(tensors, to / "b.safetensors")
            else:
                save_file(tensors | scales, to / "model.safetensors")
        else:
            save_file(tensors, to / "model.safetensors")
        (to / "config.json").write_text(json.dumps(config))
    return ready, dequantised
