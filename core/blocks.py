"""Who owns which block of the KV cache: BlockPool, BlockTable, and BlockGroups, which joins the groups of a model.

A full block whose tokens are known is published under a hash chained over everything before it, and can then be shared
by any sequence with the same prefix, also after its owner has freed it, until it is evicted (least recently used
first). Only full, published blocks are ever shared; a fork copies its partial block (copy-on-write, done at the fork).
Pure: no torch, no clock.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from core.messages import KVSpec

NO_BLOCK = -1  # a table entry that a sliding window no longer needs


def root_key(parts: Seq[str]) -> bytes:
    """The hash that a prefix chain starts from: model revision, adapter, salt, media digest."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def chain_key(parent: bytes, token_ids: Seq[int]) -> bytes:
    """The hash of a full block: its tokens and, through `parent`, everything before them."""
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """The blocks of one KV group: reference counts, the free list, and the prefix cache's index.

    A free block keeps its content and its key until it is allocated anew.
    """

    def __init__(self, num_blocks: int, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self.refs = [0] * num_blocks
        self.keys: list[bytes | None] = [None] * num_blocks
        self.index: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.num_cached = 0  # free blocks whose content can still be reused

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self.free)

    def allocate(self) -> int:
        """Take the free block that was used least recently, with one reference; its old content is forgotten.

        Raises KeyError when none is free.
        """
        block, _ = self.free.popitem(last=False)
        key = self.keys[block]
        if key is not None:
            del self.index[key]
            self.keys[block] = None
            self.num_cached -= 1
        self.refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more owner; a free, cached block leaves the free list."""
        if self.refs[block] == 0:
            del self.free[block]
            self.num_cached -= self.keys[block] is not None
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One owner less; without any the block is free: last in line if it is cached, first if not."""
        refs = self.refs[block] - 1
        if refs < 0:
            raise AssertionError(f"block {block} released more often than retained")
        self.refs[block] = refs
        if refs == 0:
            self.free[block] = None
            if self.keys[block] is None:
                self.free.move_to_end(block, last=False)
            else:
                self.num_cached += 1

    def lookup(self, key: bytes) -> int | None:
        """The block with this content, free or not."""
        return self.index.get(key)

    def publish(self, block: int, key: bytes) -> None:
        """Offer a full block's content to others. A second block of the same content stays private."""
        if self.caching and self.keys[block] is None and key not in self.index:
            self.keys[block] = key
            self.index[key] = block
            self.num_cached += self.refs[block] == 0

    def forget(self) -> None:
        """All content is lost (the workers came back empty). Owners must have released their blocks."""
        self.index.clear()
        self.keys = [None] * self.num_blocks
        self.num_cached = 0


@dataclass(slots=True)
class BlockTable:
    """A sequence's blocks in one group, by position // block_size. Entries before `first` are NO_BLOCK."""

    ids: list[int] = field(default_factory=list)
    first: int = 0


class BlockGroups:
    """All KV groups of a model behind one interface; the tables of a sequence have one entry per group."""

    def __init__(self, specs: Seq[KVSpec], num_blocks: Seq[int], block_size: int, caching: bool = True) -> None:
        self.specs = list(specs)
        self.block_size = block_size
        self.pools = [BlockPool(count, caching) for count in num_blocks]

    def new_tables(self) -> list[BlockTable]:
        """Empty tables for a sequence."""
        return [BlockTable() for _ in self.specs]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def first_needed(self, group: int, position: int) -> int:
        """The first table entry that a query at `position` still reads."""
        window = self.specs[group].window
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    # ------------------------------------------------------------------------------------------ prefix cache

    def match(self, keys: Seq[bytes]) -> int:
        """How many leading blocks (of those with `keys`) every group can serve.

        A full-attention group must hold all of them, a sliding one only those that the next position still sees.
        """
        length = len(keys)
        for spec, pool in zip(self.specs, self.pools, strict=True):
            if spec.window is None:
                length = next((i for i in range(length) if keys[i] not in pool.index), length)
        stable = False
        while not stable:
            stable = True
            for group, spec in enumerate(self.specs):
                if spec.window is not None and (served := self._sliding_match(group, keys, length)) < length:
                    length, stable = served, False
        return length

    def _sliding_match(self, group: int, keys: Seq[bytes], length: int) -> int:
        """The largest n <= length such that the blocks that position n * block_size sees are all there."""
        index = self.pools[group].index
        end = position = length
        while position > self.first_needed(group, end * self.block_size):
            position -= 1
            if keys[position] not in index:
                end = position
        return end

    def adopt(self, tables: list[BlockTable], keys: Seq[bytes], length: int) -> None:
        """Fill empty tables with the `length` matched blocks and hold them."""
        for group, (table, pool) in enumerate(zip(tables, self.pools, strict=True)):
            table.first = self.first_needed(group, length * self.block_size)
            table.ids = [NO_BLOCK] * table.first
            for key in keys[table.first : length]:
                block = pool.index[key]
                pool.retain(block)
                table.ids.append(block)

    def publish(self, tables: list[BlockTable], keys: Seq[bytes], start: int, stop: int) -> None:
        """Offer the blocks [start, stop) of a sequence, whose KV has been computed, to everybody."""
        for table, pool in zip(tables, self.pools, strict=True):
            for i in range(max(start, table.first), stop):
                pool.publish(table.ids[i], keys[i])

    # ------------------------------------------------------------------------------------------ growth

    def missing(self, tables: list[BlockTable], num_tokens: int) -> int:
        """How many more blocks `num_tokens` tokens take (the same in each group)."""
        return max(0, self.blocks_for(num_tokens) - len(tables[0].ids))

    def can_take(self, count: int) -> bool:
        """Whether every group has `count` free blocks."""
        return all(len(pool.free) >= count for pool in self.pools)

    def grow(self, tables: list[BlockTable], count: int) -> None:
        """Append `count` fresh blocks in every group; ask `can_take` first."""
        for table, pool in zip(tables, self.pools, strict=True):
            for _ in range(count):
                table.ids.append(pool.allocate())

    def slide(self, tables: list[BlockTable], position: int) -> None:
        """Free what a sequence whose next query is at `position` no longer sees."""
        for group, (table, pool) in enumerate(zip(tables, self.pools, strict=True)):
            needed = min(self.first_needed(group, position), len(table.ids))
            for i in range(table.first, needed):
                pool.release(table.ids[i])
                table.ids[i] = NO_BLOCK
            table.first = max(table.first, needed)

    def fork(
        self, parent: list[BlockTable], tables: list[BlockTable], position: int
    ) -> list[tuple[int, int, int]] | None:
        """Share the parent's blocks with a fork whose next query is at `position`.

        Whole blocks before `position` are shared; the partial one, if any, is copied.
        Returns the copies (group, src, dst), or None when the parent has let go of a block that the fork needs or no
        block is free for the copy.
        """
        whole, rest = divmod(position, self.block_size)
        end = whole + (1 if rest else 0)
        for group, table in enumerate(parent):
            first = self.first_needed(group, position)
            if len(table.ids) < end or table.first > first or (rest and not self.pools[group].free):
                return None
        copies = []
        for group, (source, table, pool) in enumerate(zip(parent, tables, self.pools, strict=True)):
            table.first = self.first_needed(group, position)
            table.ids = [NO_BLOCK] * table.first
            for block in source.ids[table.first : whole]:
                pool.retain(block)
                table.ids.append(block)
            if rest:
                table.ids.append(pool.allocate())
                copies.append((group, source.ids[whole], table.ids[whole]))
        return copies

    def release(self, tables: list[BlockTable]) -> None:
        """Let go of everything, the end of the sequence first: it is the least likely to be asked for again."""
        for table, pool in zip(tables, self.pools, strict=True):
            for block in reversed(table.ids[table.first :]):
                pool.release(block)
            table.ids = []
            table.first = 0

    def forget(self) -> None:
        """All content is lost; see BlockPool.forget."""
        for pool in self.pools:
            pool.forget()
