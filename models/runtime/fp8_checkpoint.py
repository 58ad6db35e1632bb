"""Fp8Checkpoint: what config.json says of weights that are stored in FP8 already.

Two spellings are read. "fp8" (Hugging Face's fine-grained FP8, and older per-tensor checkpoints of the same name):
weight_scale_inv per block of weight_block_size, or one scale per tensor. "compressed-tensors": float weights of 8 bits
with weight_scale per output channel, tensor or block. In both, weight = stored value * scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.errors import QuireError

SUPPORTED = "'fp8', and 'compressed-tensors' with float weights of 8 bits"
STRATEGIES = ("tensor", "channel", "block")
WEIGHT = ".weight"
SCALES = (".weight_scale", ".weight_scale_inv")
# Scales of static activations. Activations are quantised with a scale per token, which is finer, or not at all.
NOT_NEEDED = re.compile(r"\.(input_scale|activation_scale|activation_scale_inv)$")


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """block: (rows, columns) that share a scale, None for scales per channel or tensor. stores_fp8: whether a module
    of the checkpoint (model.layers.0.mlp.up_proj) is stored in FP8. static: there are scales of activations too."""

    method: str
    block: tuple[int, int] | None
    stores_fp8: Callable[[str], bool]
    static: bool

    @staticmethod
    def read(config: dict[str, Any]) -> Fp8Checkpoint | None:
        """None for a plain checkpoint. Raises QuireError model_invalid for a format that is not read."""
        settings = config.get("quantization_config") or config.get("compression_config")
        if not settings:
            return None
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method == "fp8":
            return _fine_grained(settings)
        if method == "compressed-tensors":
            return _compressed_tensors(settings)
        text = f"the checkpoint is quantised by {method!r}; quantised checkpoints that are read: {SUPPORTED}"
        raise _invalid(text + ". Or serve the plain one, with --quantization if wanted")


def _fine_grained(settings: dict[str, Any]) -> Fp8Checkpoint:
    _require("fmt", settings.get("fmt"), None, "e4m3")
    scheme = settings.get("activation_scheme", "dynamic")
    _require("activation_scheme", scheme, "dynamic", "static")
    kept = _names(settings, "modules_to_not_convert") + _names(settings, "ignored_layers")

    def stores_fp8(module: str) -> bool:
        # A name stands for itself and for what is inside of it, and may leave out where it is.
        return module != "lm_head" and not any(f".{name}." in f".{module}." for name in kept)

    return Fp8Checkpoint("fp8", _block(settings.get("weight_block_size")), stores_fp8, scheme == "static")


def _compressed_tensors(settings: dict[str, Any]) -> Fp8Checkpoint:
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _invalid("config.json: quantization_config: config_groups must be an object of objects")
    sparsity = settings.get("sparsity_config") or {}
    density = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    _require("sparsity_config.format", density, None, "dense")
    if settings.get("transform_config"):
        raise _invalid("config.json: quantization_config: transform_config (rotated weights) is not supported")
    blocks: set[tuple[int, int] | None] = set()
    targets: list[str] = []
    static = False
    for name, group in groups.items():
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, dict):
            raise _invalid(f"config.json: quantization_config: {name} has no weights")
        for what, given in (("weights", weights), ("input_activations", inputs)):
            kind = (given.get("type"), given.get("num_bits")) if isinstance(given, dict) else (given, None)
            if given is not None and kind != ("float", 8):
                text = f"the checkpoint's {what} are {kind[0]} of {kind[1]} bits"
                raise _invalid(f"{text}; quantised checkpoints that are read: {SUPPORTED}")
        _require(f"{name}.weights.strategy", weights.get("strategy"), *STRATEGIES)
        blocks.add(_block(weights.get("block_structure")) if weights["strategy"] == "block" else None)
        targets += _names(group, "targets")
        static |= isinstance(inputs, dict) and not inputs.get("dynamic")
    if len(blocks) > 1:
        raise _invalid("config.json: quantization_config: scales per block in some groups only are not supported")
    ignored = _names(settings, "ignore")

    def stores_fp8(module: str) -> bool:
        return _listed(targets, module) and not _listed(ignored, module)

    return Fp8Checkpoint("compressed-tensors", blocks.pop(), stores_fp8, static)


def _listed(names: list[str], module: str) -> bool:
    """Whether a list of modules, patterns ("re:…") and the class "Linear" has a module."""
    return any(
        re.match(name[3:], module) is not None if name.startswith("re:") else name in ("Linear", module)
        for name in names
    )


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):  # some files say "128x128"
        value = [int(part) if part.isdecimal() else part for part in value.split("x")]
    if not (isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)):
        raise _invalid(f"config.json: quantization_config: a block must be two sizes, is {value!r}")
    return value[0], value[1]


def _names(settings: dict[str, Any], key: str) -> list[str]:
    names = settings.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _invalid(f"config.json: quantization_config: {key} must be a list of names, is {names!r}")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise _invalid(f"config.json: quantization_config: {key}: {name!r} is no pattern: {error}") from None
    return names


def _require(key: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        known = ", ".join(map(str, allowed))
        raise _invalid(f"config.json: quantization_config: {key} {value!r} is not supported; supported: {known}")


def _invalid(text: str) -> QuireError:
    return QuireError("model_invalid", text, "model")
