"""The page pool: which blocks are free, who refers to them, and which prefix each one holds. Pure integers.

Free blocks stand in order of release and keep their hash until they are taken, so eviction is least-recently-used and a
prefix that nobody uses stays findable as long as its blocks are not needed. Block 0 is never handed out: padding may
point at it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class NoPages(Exception):
    """Every block is in use."""


class Pages:
    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = blocks
        self._references = [0] * blocks
        self._hash_of: list[bytes | None] = [None] * blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, blocks))

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of a hash chain."""
        found: list[int] = []
        for hash in hashes:
            block = self._block_of.get(hash)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody refers to (so that taking them shrinks the free list)."""
        return sum(self._references[block] == 0 for block in blocks)

    def take(self, blocks: Iterable[int]) -> None:
        """Refer to blocks that hold something already."""
        for block in blocks:
            self._free.pop(block, None)
            self._references[block] += 1

    def allocate(self) -> int:
        """A block to write to; what it held is forgotten. Raises NoPages."""
        if not self._free:
            raise NoPages
        block, _ = self._free.popitem(last=False)
        hash = self._hash_of[block]
        if hash is not None:
            del self._block_of[hash]
            self._hash_of[block] = None
        self._references[block] = 1
        return block

    def shared(self, block: int) -> bool:
        return self._references[block] > 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of blocks. The last of a chain is freed first: a prefix is worth more than what follows it."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, "a block was released twice"
            if self._references[block] == 0:
                self._free[block] = None

    def publish(self, block: int, hash: bytes) -> None:
        """A block is full and computed: it may serve other sequences. The first one to hold a hash keeps it."""
        if hash not in self._block_of and self._hash_of[block] is None:
            self._block_of[hash] = block
            self._hash_of[block] = hash
