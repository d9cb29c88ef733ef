"""KV blocks: which are free, and how many tokens hold how many. Plain Python; the tensors are in kv.py."""


class BlockPool:
    """Hands out numbered blocks of `block_size` tokens each. Owned by the scheduler."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend a sequence's block table until it holds `tokens`; False, and nothing taken, if blocks run out."""
        missing = self.needed(tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Take back a sequence's blocks and empty its table."""
        self._free.extend(reversed(table))
        table.clear()
