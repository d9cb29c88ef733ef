"""What a replacement policy is."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

Evictable = Callable[[int], bool]


class Policy(Protocol):
    """The order of a tier's records. Keys are inserted once, and removed before they are inserted again."""

    def insert(self, key: int) -> None:
        """The record is coming in; a `touch` follows when a step uses it, which for a prefetched one is later."""

    def touch(self, key: int) -> None:
        """The record is used now."""

    def remove(self, key: int) -> None: ...

    def victim(self, evictable: Evictable) -> int | None:
        """The key to evict first among those that may be; it stays until `remove`. None if none may be."""

    def keys(self) -> Iterable[int]:
        """All of them, first the one that would be evicted first if all may be."""
        ...

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        """The step at hand runs these tokens of a sequence, all of them, in order. Its first call begins it."""

    def end(self, sequence: Hashable) -> None:
        """The sequence is over; one that never began is no error."""


class Oblivious:
    """The part of a policy that knows nothing of sequences."""

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        pass

    def end(self, sequence: Hashable) -> None:
        pass
