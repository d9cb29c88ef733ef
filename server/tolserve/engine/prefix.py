"""Prefix caching: keys of full KV blocks, so that a text which was computed before is not computed again."""

from array import array
from hashlib import blake2b
from secrets import token_bytes

from tolserve.engine.blocks import BlockPool
from tolserve.engine.sequence import Sequence

# Of a cryptographic hash: texts with equal keys would show each other's, and to find two takes 2^128 attempts. A block
# of 16 tokens takes 1.5 us, and 16 sequences that decode fill one per step. All together `ran` adds 6 us to that step.
_KEY_BYTES = 32


class PrefixCache:
    """Finds and names the blocks of a pool by what their keys and values follow from.

    A key is a hash of the block's tokens and of the key before it; the first follows from `_root`. So equal keys mean
    equal texts from the beginning on, under equal conditions.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.version = 0  # of the table; what was computed under another one is not found
        self._secret = token_bytes(_KEY_BYTES)  # keys that were found elsewhere are worth nothing here

    def find(self, sequence: Sequence) -> list[int]:
        """The blocks of its longest beginning that is known, in order.

        The last token is never among them, since its logits are asked for; nor a prompt token whose log-probabilities
        still are.
        """
        usable = len(sequence.tokens) - 1
        if 0 < len(sequence.prompt_logprobs) < sequence.prompt_length:
            usable = len(sequence.prompt_logprobs) - 1
        full = usable // self._pool.block_size
        blocks: list[int] = []
        for key in self._keys(sequence, full)[:full]:
            if (block := self._pool.find(key)) is None:
                break
            blocks.append(block)
        return blocks

    def ran(self, sequence: Sequence, start: int, end: int) -> None:
        """The tokens [start, end) have their keys and values: the blocks that they fill may be found from now on."""
        size = self._pool.block_size
        first, last = start // size, end // size
        if first < last:
            keys = self._keys(sequence, last)
            for index in range(first, last):
                self._pool.name(sequence.blocks[index], keys[index])

    def _keys(self, sequence: Sequence, blocks: int) -> list[bytes]:
        """The keys of a sequence's first `blocks` blocks at least, each computed once."""
        keys, size = sequence.block_keys, self._pool.block_size
        if not sequence.root_key:
            sequence.root_key = self._root(sequence)
        while len(keys) < blocks:
            tokens = array("q", sequence.tokens[len(keys) * size : (len(keys) + 1) * size])
            before = keys[-1] if keys else sequence.root_key
            keys.append(blake2b(before + tokens.tobytes(), digest_size=_KEY_BYTES).digest())
        return keys

    def _root(self, sequence: Sequence) -> bytes:
        """The key before the first block: whatever changes keys and values beside the tokens belongs in here. A
        request's salt keeps it from those with another, or with none."""
        steering, salt = sequence.steering, sequence.request.cache_salt
        told = b"%d/" % self.version + (b"" if steering is None else b"steered" + steering.key)
        told += b"" if salt is None else b"salt" + salt.encode()
        return blake2b(told, digest_size=_KEY_BYTES, key=self._secret).digest()
