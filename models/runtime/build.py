"""Puts a runner together: device, ranks, weights, KV cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from msgspec.structs import replace

from core.config import Config
from core.grammar import load_grammars
from core.grammar_rows import GrammarRows
from core.model_info import ModelInfo
from core.process import Process
from hw.backend import Backend, Capabilities, CompilesAhead, Compiling
from hw.comm import Comm, TorchComm
from hw.kvcache import KVLayout
from hw.select import select
from models.layers.decoder import Decoder
from models.runtime.every_launch import every_launch, keep_kinds
from models.runtime.kv_scales import set_kv_scales
from models.runtime.loader import load_model, num_bytes
from models.runtime.memory import plan_blocks
from models.runtime.rendezvous import meet
from models.runtime.runner import Limits, ModelRunner
from models.runtime.step import STEP_TOKENS


def build_runner(process: Process, phases: dict[str, float]) -> ModelRunner:
    """The runner of this rank. `phases` gets the seconds of each part.

    Raises:
        QuireError: a wrong option or checkpoint. MemoryError: the cache does not fit.
    """
    config, rank = process.config, process.index
    torch.set_num_threads(threads(config))
    backend = select(config.device, rank, Path(config.cache_dir))
    compiling = begin_compiling(config, process.model, backend, rank)
    try:
        comm = join(process, backend) if config.tensor_parallel_size > 1 else Comm()
        return load_runner(config, process.model, backend, comm, phases, compiling)
    finally:
        if compiling is not None:
            compiling.close()


def load_runner(
    config: Config,
    model: ModelInfo,
    backend: Backend,
    comm: Comm,
    phases: dict[str, float] | None = None,
    compiling: Compiling | None = None,
) -> ModelRunner:
    """Load the weights and make the cache on a device that is there. `compiling`: its kernels, under way."""
    phases = {} if phases is None else phases
    grammars = new_grammars(model)
    grammars.prepare()
    begin_s = time.monotonic()
    loaded = load_weights(config, model, backend, comm)
    phases["weights"] = time.monotonic() - begin_s
    return make_runner(config, model, backend, loaded, grammars, phases, compiling)


def new_grammars(model: ModelInfo) -> GrammarRows:
    """Grammars over a model's vocabulary, which is not read yet."""
    return GrammarRows(model.vocab_size, lambda: load_grammars(model))


def load_weights(config: Config, model: ModelInfo, backend: Backend, comm: Comm) -> Decoder:
    """This rank's share of the model."""
    return load_model(
        Path(model.path),
        backend,
        comm,
        dtype=dtype_of(config.dtype, "dtype", backend.capabilities.dtypes, backend.capabilities),
        quantization=config.quantization,
        load_format=config.load_format,
        num_positions=model.max_model_len,
        seed=config.seed,
    )


def make_runner(
    config: Config,
    model: ModelInfo,
    backend: Backend,
    loaded: Decoder,
    grammars: GrammarRows,
    phases: dict[str, float],
    compiling: Compiling | None = None,
) -> ModelRunner:
    """The cache and the graphs around a loaded model."""
    begin_s = time.monotonic()
    on_cpu = backend.device.type == "cpu"
    facts = backend.capabilities
    if config.kv_dtype == "auto":
        stored = dtype_of(config.dtype, "dtype", facts.dtypes, facts)
    else:
        stored = dtype_of(config.kv_dtype, "kv_dtype", facts.kv_dtypes, facts)
    layout = KVLayout.build(loaded.kv_layers, config.block_size or facts.block_size, stored)
    blocks = plan_blocks(
        config, layout, backend.free_bytes(), model.max_model_len, on_cpu=on_cpu, ranks=config.tensor_parallel_size
    )
    pool = backend.make_kv_cache(layout.with_blocks(blocks))
    phases["cache"] = time.monotonic() - begin_s
    limits = Limits(
        max_num_seqs=config.max_num_seqs,
        max_model_len=model.max_model_len,
        max_step_tokens=config.max_step_tokens or STEP_TOKENS,
        vocab_size=model.vocab_size,
    )
    if compiling is not None:
        begin_s = time.monotonic()
        compiling.wait()
        phases["compile"] = time.monotonic() - begin_s
    begin_s = time.monotonic()
    set_kv_scales(
        pool,
        loaded,
        config.kv_scales,
        Path(model.path),
        dummy=config.load_format == "dummy",
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
    )
    if pool.scales is not None:
        phases["kv_scales"] = time.monotonic() - begin_s
    begin_s = time.monotonic()
    graphs = backend.graphs(loaded.forward, limits.max_step_tokens, limits.max_num_seqs)
    runner = ModelRunner(loaded.forward, loaded.logits, backend, pool, limits, grammars, num_bytes(loaded), graphs)
    if graphs is not None:
        phases["graphs"] = time.monotonic() - begin_s
    return runner


def begin_compiling(config: Config, model: ModelInfo, backend: Backend, rank: int) -> Compiling | None:
    """Let a device that compiles kernels begin while the weights load; None for one that does not."""
    if not isinstance(backend, CompilesAhead):
        return None

    def trace(stand_in: Backend, comm: Comm) -> None:
        few = replace(config, load_format="dummy", num_kv_blocks=2)
        loaded = load_weights(few, model, stand_in, comm)
        keep_kinds(loaded)
        every_launch(make_runner(few, model, stand_in, loaded, new_grammars(model), {}), config.max_num_seqs)

    return backend.precompile(trace, rank, config.tensor_parallel_size)


def join(process: Process, backend: Backend) -> Comm:
    """The group of ranks of this start."""
    rank, size = process.index, process.config.tensor_parallel_size
    epoch = meet(process.run_dir, rank, keep_waiting=lambda: not process.stopping)
    collectives = "nccl" if backend.device.type == "cuda" else "gloo"  # torch calls AMD's devices and RCCL so too
    return TorchComm(collectives, rank, size, process.run_dir, epoch=epoch)


def dtype_of(name: str, option: str, supported: tuple[str, ...], facts: Capabilities) -> torch.dtype:
    """The torch type of an option; "auto" is the device's best of those it has for it (`supported`). Raises QuireError
    invalid_config."""
    if name == "auto":
        name = supported[0]
    if name not in supported:
        raise facts.refusal(option, name, supported)
    dtype: torch.dtype = getattr(torch, facts.fp8 if name == "fp8" and facts.fp8 else name)
    return dtype


def threads(config: Config) -> int:
    """CPU threads of one rank: its share of the cores that this process may use."""
    if config.torch_threads is not None:
        return config.torch_threads
    return max(1, len(os.sched_getaffinity(0)) // config.tensor_parallel_size)
