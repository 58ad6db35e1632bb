"""How large the KV cache becomes: a pure function of the options and of what is free."""

from __future__ import annotations

from core.config import Config
from core.errors import QuireError
from core.kv_layout import KVLayout

CPU_SHARE = 0.25  # of free memory: other programs live there too
CPU_MOST_BYTES = 4 << 30


def plan_blocks(
    config: Config, layout: KVLayout, free_bytes: int, max_model_len: int, *, on_cpu: bool, ranks: int
) -> int:
    """Blocks per KV group on one rank: num_kv_blocks, or what kv_gib or a default share of `free_bytes` holds.

    Never more than all sequences could fill. `ranks` share one CPU's memory; each GPU has its own.

    Raises:
        QuireError invalid_config: not even one sequence of a few blocks fits; the message names bytes and options.
    """
    per_sequence = -(-(max_model_len + 1) // layout.block_size)
    most = config.max_num_seqs * per_sequence + 1
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    if config.kv_gib is not None:
        budget = int(config.kv_gib * 2**30)
    elif on_cpu:
        budget = int(min(CPU_MOST_BYTES, free_bytes * CPU_SHARE)) // ranks
    else:
        budget = int(free_bytes * config.gpu_memory_utilization)
    blocks = min(most, layout.blocks_in(budget))
    if blocks < 2:
        raise QuireError(
            "invalid_config",
            f"--kv-gib: {budget / 2**30:.3f} GiB hold {blocks} KV blocks of {layout.block_size} tokens; at least 2 are "
            "needed: give it more, or free memory",
            "kv_gib",
        )
    return blocks
