"""Build: from options to a ModelRunner: backend, ranks, model, memory plan, cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from core.config import Config
from core.errors import QuireError
from core.model_info import ModelInfo
from core.process import Process
from hw.backend import Backend
from hw.comm import Comm, TorchComm
from hw.kvcache import KVLayout
from hw.select import select
from models.runtime.loader import load_model, num_bytes
from models.runtime.rendezvous import meet
from models.runtime.runner import Limits, ModelRunner

CPU_CACHE_SHARE = 0.25  # of the memory that is free: others live on the machine, too
CPU_CACHE_MAX_BYTES = 4 * 2**30
DEFAULT_STEP_TOKENS = 2048


def build_runner(process: Process, phases: dict[str, float]) -> ModelRunner:
    """Everything a worker needs; `phases` gets the seconds of each part."""
    config, model = process.config, process.model
    size = config.tensor_parallel_size
    threads = config.torch_threads or max(1, (os.cpu_count() or 1) // size)
    torch.set_num_threads(threads)
    begin_s = time.monotonic()
    backend = select(config.device, process.index)
    comm = Comm()
    if size > 1:
        epoch = meet(process.run_dir, process.index)
        kind = "nccl" if backend.device.type == "cuda" else "gloo"
        comm = TorchComm(kind, process.index, size, process.run_dir, epoch=epoch)
    phases["device"] = time.monotonic() - begin_s
    begin_s = time.monotonic()
    runner = make_runner(config, model, backend, comm)
    phases["model"] = time.monotonic() - begin_s
    return runner


def make_runner(config: Config, model: ModelInfo, backend: Backend, comm: Comm) -> ModelRunner:
    """Load the model, plan the memory, allocate the cache."""
    dtype = choose_dtype(config.dtype, backend)
    decoder = load_model(
        Path(model.path),
        backend,
        comm,
        dtype=dtype,
        quantization=config.quantization,
        load_format=config.load_format,
        num_positions=model.max_model_len,
        seed=config.seed,
    )
    kv_dtype = dtype if config.kv_dtype == "auto" else choose_dtype(config.kv_dtype, backend)
    layout = KVLayout.build(decoder.kv_layers, config.block_size or backend.capabilities.block_size, kv_dtype)
    layout = layout.with_blocks(plan_blocks(config, model, backend, layout))
    limits = Limits(
        max_num_seqs=config.max_num_seqs,
        max_model_len=model.max_model_len,
        max_step_tokens=config.max_step_tokens or max(DEFAULT_STEP_TOKENS, config.max_num_seqs),
        vocab_size=model.vocab_size,
    )
    pool = backend.make_kv_cache(layout)
    return ModelRunner(decoder.forward, decoder.logits, backend, pool, limits, num_bytes(decoder))


def choose_dtype(name: str, backend: Backend) -> torch.dtype:
    """The torch type of --dtype; "auto" is the backend's first. Raises QuireError when the backend cannot."""
    offered = backend.capabilities.dtypes
    name = offered[0] if name == "auto" else name
    if name not in offered:
        text = f"--dtype: {name} is not available on {backend.capabilities.name}; choose {', '.join(offered)}"
        raise QuireError("invalid_config", text, "dtype")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def plan_blocks(config: Config, model: ModelInfo, backend: Backend, layout: KVLayout) -> int:
    """Blocks per KV group: what is asked for, or a share of the free memory, never more than could be used.

    Raises QuireError invalid_config when not even one sequence of the longest length fits.
    """
    per_sequence = -(-model.max_model_len // layout.block_size) + 1
    most = per_sequence * config.max_num_seqs + 1
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_gib is not None:
        blocks = layout.blocks_in(int(config.kv_gib * 2**30))
    elif backend.device.type == "cpu":
        budget = min(CPU_CACHE_MAX_BYTES, int(backend.free_bytes() * CPU_CACHE_SHARE))
        blocks = min(most, layout.blocks_in(budget))
    else:
        blocks = min(most, layout.blocks_in(backend.free_bytes()))
    if blocks < per_sequence:
        text = (
            f"the KV cache would hold {max(0, blocks) * layout.block_size:,} tokens, less than one sequence of "
            f"{model.max_model_len:,}; lower --max-model-len or raise --kv-gib"
        )
        raise QuireError("invalid_config", text, "kv_gib")
    return int(blocks)
