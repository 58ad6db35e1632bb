"""KV scales: with which factor each layer's K and V are stored in an FP8 cache (stored = value / scale).

From the checkpoint where it has them, otherwise measured before the first step: a few fixed prompts run through the
model over a small cache in the model's own type, and the largest K (rotated, as it is stored) and V of each layer are
taken. All ranks use the same scales, so an answer does not depend on how heads are shared.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import tokenizers
import torch

from core.errors import QuireError
from core.messages import NewSequence, RowBlocks, Scheduled
from core.model_info import read_json
from hw.kvcache import KVCachePool, KVLayout
from hw.ops import GroupInputs, StepInputs
from hw.quant.fnuz import FNUZ, SCALE_RATIO
from models.layers.decoder import Decoder
from models.runtime.inputs import RowState
from models.runtime.weight_files import some, tensors
from quire import SamplingParams

log = logging.getLogger("quire.kv_scales")

Source = Literal["auto", "checkpoint", "calibrate", "one"]

# What is stored is floating point: a scale that is twice too large costs one bit of range at the small end, and nothing
# of the precision; one that is too small clips. So there is room for twice the largest value that was seen.
MARGIN = 2.0
PROMPT_TOKENS = 64  # of each prompt: all have the same length, so that any vocabulary runs the same kernels
TEXTS = (
    "The harbour lay quiet in the early morning. Two boats had come in during the night, and their crews sat on the "
    "wall drinking coffee, waiting for the market to open. Nobody spoke much; the storm of the last three days was "
    "still in their hands. When the first lorry came down the hill, an old woman began to count the boxes aloud.",
    "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n"
    '\n\nprint(median([3.5, 1.25, -7e3]))\n{"id": 90210, "tags": ["a", "b"], "total": 1048576.75, "ok": true}\n',
    "Die Brücke wurde 1897 gebaut. Le train de sept heures est en retard. ¿Dónde está la biblioteca? "
    "今日は天気が良いので、散歩に行きましょう。 我们明天去图书馆。 Сегодня вечером будет дождь. مرحبا بالعالم. "
    "नमस्ते दुनिया. 오늘은 날씨가 좋네요.",
)
LAYER = r"\.(?P<layer>\d+)\.self_attn\."
KV_SCALE = re.compile(
    LAYER + r"(?:(?:attn\.|[qkv]_proj\.|qkv_proj\.)?(?P<what>q|k|v|kv|prob)_scale|(?P<of>[qkv])_proj\.output_scale)$"
)
"""Names of these scales in checkpoints; those of q and of the probabilities are not needed."""


def set_kv_scales(
    pool: KVCachePool, model: Decoder, source: Source, folder: Path, *, dummy: bool, vocab_size: int, max_model_len: int
) -> None:
    """Set the scales of an FP8 cache; for every other storage there is nothing to do.

    Args:
        folder: of the checkpoint, for its scales and its tokenizer.
        dummy: the weights are random, so the checkpoint's scales are not theirs.

    Raises:
        QuireError invalid_config: source "checkpoint", which has none. model_invalid: its scales are no scales, or the
            model computes values that are not finite.
    """
    if pool.scales is None:
        return
    if source == "one":
        limit = torch.finfo(pool.dtype).max
        log.warning("FP8 KV cache: scales are 1.0, as --kv-scales asks; values beyond %g are clipped", limit)
        return
    num_layers = len(pool.layers)
    if source != "calibrate" and not dummy:
        try:
            stored = checkpoint_scales(folder, num_layers)
        except ValueError as error:
            raise QuireError("model_invalid", str(error), "model") from None
        if stored is not None:
            if pool.dtype is FNUZ:  # they are meant for a format that reaches twice as far
                stored *= SCALE_RATIO
            pool.scales.copy_(stored)
            log.info("FP8 KV cache: scales of the checkpoint; %s", _ranges(stored))
            return
    if source == "checkpoint":
        why = "random weights have none" if dummy else "this checkpoint has none for every layer"
        raise QuireError("invalid_config", f"--kv-scales: 'checkpoint': {why}; choose auto or calibrate", "kv_scales")
    largest = largest_values(model, prompts(folder, vocab_size, min(PROMPT_TOKENS, max_model_len)), vocab_size)
    if largest.is_meta:  # a device that compiles kernels ahead only wants to see them launched
        return
    if not bool(torch.isfinite(largest).all()):
        raise QuireError("model_invalid", "the model computes keys or values that are not finite", "model")
    scales = torch.where(largest > 0, largest * (MARGIN / torch.finfo(pool.dtype).max), 1.0)
    pool.scales.copy_(scales)
    log.info("FP8 KV cache: scales calibrated on %d prompts; %s", len(TEXTS) + 1, _ranges(scales))
    if not bool((largest > 0).all()):
        layers = (largest == 0).any(1).nonzero().flatten().tolist()
        log.warning("FP8 KV cache: keys or values of layers %s are all zero; their scale stays 1.0", layers)


def checkpoint_scales(folder: Path, num_layers: int) -> torch.Tensor | None:
    """[layers, 2] float32 of K and V; None if the checkpoint lacks any, or has them for another storage than FP8.

    Several scales of one tensor (per head) give their largest. Raises ValueError for what is not a scale.
    """
    config = read_json(folder / "config.json")
    settings = config.get("quantization_config") or config.get("compression_config")
    scheme = settings.get("kv_cache_scheme") if isinstance(settings, dict) else None
    if isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) != ("float", 8):
        return None
    found = torch.zeros(num_layers, 2)
    for name, tensor in tensors(folder):
        match = KV_SCALE.search(name)
        which = (match["what"] or match["of"]) if match else "q"
        if match is None or which not in ("k", "v", "kv"):
            continue
        scale = tensor().float()
        if not scale.numel() or not bool(torch.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{name} must be above 0 and finite; --kv-scales calibrate does without it")
        layer = int(match["layer"])
        if layer >= num_layers:
            raise ValueError(f"{name} is of a layer that the model does not have")
        for column in ("kv".index(letter) for letter in which):
            # A file may keep an old "kv_scale" beside the two that followed it: those are meant.
            if which != "kv" or found[layer, column] == 0:
                found[layer, column] = scale.max()
    lacking = [str(layer) for layer in range(num_layers) if not bool(found[layer].all())]
    if lacking and len(lacking) < num_layers:
        log.warning("FP8 KV cache: the checkpoint has scales, but none for layers %s", some(lacking))
    return None if lacking else found


def prompts(folder: Path, vocab_size: int, length: int) -> list[list[int]]:
    """Token ids of the built-in texts, each repeated or cut to `length`, and one prompt spread over the vocabulary.

    Without a tokenizer all are spread, each with other ids.
    """
    even = [at * vocab_size // length for at in range(length)]
    spread = [[(token + shift * 7919) % vocab_size for token in even] for shift in range(len(TEXTS) + 1)]
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        # Special tokens first: many models put their largest keys on the first token of a text.
        texts = [[i for i in tokenizer.encode(text).ids if i < vocab_size] for text in TEXTS]
    except Exception as error:  # the library raises bare Exception
        log.info("FP8 KV cache: no tokenizer (%s); calibrated on ids from all over the vocabulary", error)
        return spread
    whole = [(ids * -(-length // len(ids)))[:length] if ids else spread[at] for at, ids in enumerate(texts)]
    return [*whole, spread[-1]]


@torch.inference_mode()
def largest_values(model: Decoder, sequences: list[list[int]], vocab_size: int) -> torch.Tensor:
    """[layers, 2]: the largest magnitude of K, as it is stored, and of V; over all ranks. One step computes all."""
    backend, comm = model.parts.backend, model.parts.comm
    block_size = backend.capabilities.block_size
    length = len(sequences[0])
    per_row = -(-(length + 1) // block_size)
    layout = KVLayout.build(model.kv_layers, block_size, model.parts.dtype).with_blocks(per_row * len(sequences))
    pool = backend.make_kv_cache(layout)
    state = RowState(len(sequences), length, vocab_size, block_size, len(layout.groups), backend.device)
    for row, ids in enumerate(sequences):
        state.begin(NewSequence(row, 0, ids, [], SamplingParams()))
        blocks = list(range(row * per_row, (row + 1) * per_row))
        state.set_blocks([RowBlocks(row, group, 0, blocks) for group in range(len(layout.groups))])
    step = [Scheduled(row, 0, length, sample=False) for row in range(len(sequences))]
    inputs = state.inputs(step, length * len(sequences))
    model.forward(inputs.ids, _apart(inputs.step), pool.layers)
    # The cache began as zeros, so what no token wrote does not count. NaN goes through amax.
    magnitudes = [torch.stack([store.abs().amax().float() for store in (c.k, c.v)]) for c in pool.layers]
    mine = torch.stack(magnitudes)
    return comm.all_gather(mine.view(-1, 1)).amax(1).view(-1, 2)


def _apart(step: StepInputs) -> StepInputs:
    """The inputs in memory of their own: kernels are compiled for aligned addresses, as captured steps have them."""
    return replace(
        step,
        rows=step.rows.clone(),
        query_start=step.query_start.clone(),
        seq_lens=step.seq_lens.clone(),
        positions=step.positions.clone(),
        groups=tuple(GroupInputs(group.block_tables.clone(), group.slots.clone()) for group in step.groups),
    )


def _ranges(scales: torch.Tensor) -> str:
    low, high = scales.amin(0).tolist(), scales.amax(0).tolist()
    return f"K {low[0]:.3g} to {high[0]:.3g}, V {low[1]:.3g} to {high[1]:.3g}"
