"""KV blocks: who holds which, and which hold a known text. Plain Python; the tensors are in kv.py."""

from collections import OrderedDict
from collections.abc import MutableSequence


class BlockPool:
    """Hands out numbered blocks of `block_size` tokens each. Owned by the scheduler.

    A full block may get a key (engine/prefix.py), by which others find it and hold it as well. One that nobody holds
    any more stays findable until its memory is needed: blocks without a key go first, then the one that was let go
    longest ago.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._holders = [0] * blocks
        self._free = list(range(blocks - 1, -1, -1))  # held by nobody, no key
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, findable; let go longest ago first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds, the findable ones included."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def grow(self, table: MutableSequence[int], tokens: int) -> bool:
        """Extend a sequence's block table until it holds `tokens`; False, and nothing taken, if blocks run out."""
        missing = self.needed(tokens) - len(table)
        if missing > self.free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._holders[block] = 1
            table.append(block)
        return True

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def release(self, table: MutableSequence[int]) -> None:
        """Give up a sequence's blocks and empty its table. Its last block is evicted first: without the ones before
        it nobody can use it."""
        for block in reversed(table):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)
        del table[:]

    def find(self, key: bytes) -> int | None:
        """The block that has this key."""
        return self._block_of.get(key)

    def hold(self, block: int) -> None:
        """One more sequence has a block that was found; it ends with `release`."""
        self._holders[block] += 1
        self._idle.pop(block, None)

    def name(self, block: int, key: bytes) -> None:
        """Let a full block be found by its key, unless another is: of two copies one is enough."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def check(self) -> None:
        """Raises RuntimeError when the books disagree."""
        held = [block for block, holders in enumerate(self._holders) if holders]
        if sorted([*held, *self._free, *self._idle]) != list(range(self.blocks)):
            raise RuntimeError("a block is lost, or in two places")
        if {block: key for key, block in self._block_of.items()} != self._key_of:
            raise RuntimeError("keys and blocks disagree")
        if not self._idle.keys() <= self._key_of.keys() or self._key_of.keys() & set(self._free):
            raise RuntimeError("a block without a key is kept, or one with a key is not")
