"""KVLayout: which layers share a block table, and what a block costs. Workers and `quire plan` use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from core.messages import KVSpec


class Stored(Protocol):
    """A storage type, as torch.dtype is one."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        ...


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one attention layer stores per token on this rank. `window` None: full attention."""

    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers (indices into the model) that share one block table. `num_blocks` is 0 until memory is planned."""

    layers: tuple[int, ...]
    kv: LayerKV
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The cache of one rank: groups of equal layers, and the storage type."""

    groups: tuple[KVGroup, ...]
    block_size: int
    dtype: Stored

    @staticmethod
    def build(layers: Sequence[LayerKV], block_size: int, dtype: Stored) -> KVLayout:
        """Group the layers of a model (in order); full attention comes first, so that group 0 keeps whole prefixes."""
        members: dict[LayerKV, list[int]] = {}
        for index, layer in enumerate(layers):
            members.setdefault(layer, []).append(index)
        ordered = sorted(members, key=lambda kv: kv.window is not None)
        return KVLayout(tuple(KVGroup(tuple(members[kv]), kv) for kv in ordered), block_size, dtype)

    def bytes_per_token(self, group: int) -> int:
        """Bytes that one token takes in a group, over all of its layers, K and V."""
        kv = self.groups[group].kv
        return 2 * len(self.groups[group].layers) * kv.kv_heads * kv.head_dim * self.dtype.itemsize

    def specs(self) -> list[KVSpec]:
        """The groups as the scheduler sees them."""
        return [
            KVSpec(len(group.layers), self.bytes_per_token(index), group.kv.window)
            for index, group in enumerate(self.groups)
        ]

    def blocks_in(self, num_bytes: int) -> int:
        """How many blocks fit into `num_bytes` when every group gets the same number."""
        block_bytes = self.block_size * sum(self.bytes_per_token(index) for index in range(len(self.groups)))
        return num_bytes // block_bytes

    def with_blocks(self, num_blocks: int | Sequence[int]) -> KVLayout:
        """The layout with its number of blocks (one for all groups, or one per group)."""
        counts = [num_blocks] * len(self.groups) if isinstance(num_blocks, int) else list(num_blocks)
        groups = tuple(replace(group, num_blocks=count) for group, count in zip(self.groups, counts, strict=True))
        return replace(self, groups=groups)

    @property
    def num_blocks(self) -> list[int]:
        """Blocks per group."""
        return [group.num_blocks for group in self.groups]

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache on this rank."""
        return sum(
            group.num_blocks * self.block_size * self.bytes_per_token(index) for index, group in enumerate(self.groups)
        )
