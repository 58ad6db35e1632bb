"""Memory: what is left for the KV cache beside the weights, and how many sequences that holds."""

from __future__ import annotations

from dataclasses import dataclass

from core.config import Config
from core.errors import QuireError
from models.runtime.memory import plan_blocks
from models.runtime.step import STEP_TOKENS
from tools.plan.limit import Load
from tools.plan.model import Share

# Of each GPU: what the driver keeps for itself, the CUDA context and the libraries' workspaces. Captured graphs and
# activations live in what --gpu-memory-utilization leaves.
RESERVED_BYTES = 3 << 29
MOST_SEQS = 65536  # what --max-num-seqs takes at most: the cache, not the option, is to be the limit


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one GPU. tokens: positions of cache. sequences: of the load's length that fit at once."""

    total_bytes: int
    weights_bytes: int
    kv_bytes: int
    tokens: int
    sequences: int


def memory_of(share: Share, total_bytes: int, used_share: float, load: Load, max_model_len: int) -> Memory:
    """The worker's own arithmetic on what it would find free. Nothing fits: zeros.

    Args:
        used_share: --gpu-memory-utilization.
    """
    weights = share.num_bytes
    free = total_bytes - RESERVED_BYTES - weights
    config = Config(max_num_seqs=MOST_SEQS, gpu_memory_utilization=used_share)
    try:
        blocks = plan_blocks(config, share.layout, free, max_model_len, on_cpu=False, ranks=share.ranks)
    except QuireError:  # its one reason: not even two blocks
        return Memory(total_bytes, weights, 0, 0, 0)
    layout = share.layout.with_blocks(blocks)
    held = [
        load.total_tokens if group.kv.window is None else min(load.total_tokens, group.kv.window + STEP_TOKENS)
        for group in layout.groups
    ]
    sequences = min((blocks - 1) // -(-tokens // layout.block_size) for tokens in held)
    return Memory(total_bytes, weights, layout.total_bytes, blocks * layout.block_size, sequences)
