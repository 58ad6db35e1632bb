"""Loader: a checkpoint folder to a model. Tensors are streamed one by one; each weight knows its slots.

Every tensor of the checkpoint must have a place, and every place a tensor: leftovers and gaps are errors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from core.errors import QuireError
from core.model_info import read_json
from hw.backend import Backend
from hw.comm import Comm
from hw.quant.scaled import Scaled
from hw.quant.scheme import AdoptsFp8, make_scheme
from models.layers.decoder import Decoder
from models.layers.linear import Linear
from models.layers.parts import Parts
from models.runtime import registry
from models.runtime.fp8_checkpoint import NOT_NEEDED, SCALES, WEIGHT, Fp8Checkpoint
from models.runtime.kv_scales import KV_SCALE
from models.runtime.weight_files import some, tensors

log = logging.getLogger("quire.loader")

LAYER_NUMBER = re.compile(r"(?<=^layers\.)\d+(?=\.)")  # in the names of our weights
LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")  # old files carry these; they follow from the config


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
    stored = Fp8Checkpoint.read(config)
    facts = backend.capabilities
    if stored is not None and quantization == "none" and "fp8" in facts.schemes:
        quantization = "fp8"
    parts = Parts(backend, comm, make_scheme(quantization, facts), make_scheme("none", facts), dtype)
    dummy = load_format == "dummy"
    try:
        scales = {} if stored is None or dummy else _scales(folder)
        if stored is not None:
            stores_fp8 = stored.stores_fp8 if dummy else scales.__contains__
            parts = replace(parts, keeps_plain=_keeps_plain(module.WEIGHTS, stores_fp8))
            _say(stored, isinstance(parts.scheme, AdoptsFp8), dtype)
        model: Decoder = getattr(module, "Model", Decoder)(module.config(config), parts, num_positions)
        if dummy:
            generator = torch.Generator(backend.device).manual_seed(seed)
            for weight in parts.weights.values():
                weight.fill(generator)
        else:
            tied = bool(config.get("tie_word_embeddings"))
            _load(folder, parts, module.WEIGHTS, tied, scales, stored.block if stored is not None else None)
    except ValueError as error:
        raise QuireError("model_invalid", str(error), "model") from None
    return model


def num_bytes(model: Decoder) -> int:
    """Bytes of this rank's weights."""
    return sum(weight.num_bytes for weight in model.parts.weights.values())


def _load(
    folder: Path,
    parts: Parts,
    table: dict[str, tuple[str, str]],
    tied: bool,
    scales: dict[str, torch.Tensor],
    block: tuple[int, int] | None,
) -> None:
    """`scales`: of FP8 weights, by the checkpoint's name of the module; `block` that shares one, see Scaled."""
    leftovers = []
    for name, tensor in tensors(folder):
        pattern = LAYER_INDEX.sub("{i}", name, count=1)
        weight_name, slot = table.get(pattern, ("", ""))
        index = LAYER_INDEX.search(name)
        weight = parts.weights.get(weight_name.replace("{i}", index.group() if index else ""))
        module = name.removesuffix(WEIGHT)
        if weight is not None and module != name and module in scales:
            scaled = Scaled.build(name, tensor(), scales[module], block)
            if isinstance(weight, Linear):
                weight.load_scaled(slot, scaled)
            else:
                weight.load(slot, scaled.plain())
        elif weight is not None:
            weight.load(slot, _not_packed(name, tensor()))
        elif not (tied and name == "lm_head.weight") and not _not_wanted(name, scales):
            leftovers.append(name)
    if leftovers:
        raise ValueError(f"{folder} has {len(leftovers)} tensors that the model has no place for: {some(leftovers)}")
    gaps = [f"{name} {slot}".strip() for name, weight in parts.weights.items() for slot in weight.missing()]
    if gaps:
        raise ValueError(f"{folder} lacks {len(gaps)} weights of the model: {some(gaps)}")


def _scales(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> scales of its FP8 weight. They are small, and may lie in another file than their weight."""
    found = {}
    for name, tensor in tensors(folder):
        module, dot, last = name.rpartition(".")
        if dot + last in SCALES:
            found[module] = tensor()
    return found


def _keeps_plain(table: dict[str, tuple[str, str]], stores_fp8: Callable[[str], bool]) -> Callable[[str], bool]:
    """Whether a Linear has a part that the checkpoint keeps plain: a fused product has one form for all of its parts,
    and that of the precise ones loses nothing."""
    modules: dict[str, list[str]] = {}
    for pattern, (weight, _) in table.items():
        if pattern.endswith(WEIGHT):
            modules.setdefault(weight, []).append(pattern.removesuffix(WEIGHT))

    def keeps_plain(name: str) -> bool:
        index = LAYER_NUMBER.search(name)
        weight = LAYER_NUMBER.sub("{i}", name, count=1)
        names = (module.replace("{i}", index.group() if index else "") for module in modules.get(weight, []))
        return not all(stores_fp8(module) for module in names)

    return keeps_plain


def _say(stored: Fp8Checkpoint, adopts: bool, dtype: torch.dtype) -> None:
    """What becomes of a ready-made checkpoint, in the log."""
    if not adopts:
        how = f"dequantised while loading ({dtype}, before --quantization, if any); this device has no FP8 products"
    elif stored.block is not None:
        size = f"{stored.block[0]} x {stored.block[1]}"
        how = f"scales per block of {size} become one per output channel: the weights are quantised once more"
    else:
        how = "weights are used as they are stored"
    log.info("FP8 checkpoint (%s): %s", stored.method, how)
    if stored.static:
        instead = "each token has its own" if adopts else "activations stay plain"
        log.info("its static scales of activations are not used: %s", instead)


def _not_packed(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise ValueError(f"{name} is {tensor.dtype} without a scale, or in a format that config.json does not name")
    return tensor


def _not_wanted(name: str, scales: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor is read elsewhere, follows from the config, or is a scale that is not needed."""
    module, dot, last = name.rpartition(".")
    of_weight = module in scales and (dot + last in SCALES or NOT_NEEDED.search(name))
    return bool(of_weight or KV_SCALE.search(name) or IGNORED.search(name))
