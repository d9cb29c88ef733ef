"""Who is evicted. A policy orders keys; it knows neither slots nor bytes."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol


class Policy(Protocol):
    """The order of a tier's records. Keys are inserted once, and removed before they are inserted again."""

    def insert(self, key: int) -> None: ...

    def touch(self, key: int) -> None:
        """The record is used now."""

    def remove(self, key: int) -> None: ...

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        """The key to evict first among those that may be; it stays until `remove`. None if none may be."""

    def keys(self) -> Iterable[int]:
        """All of them, in the order in which they would be evicted."""
        ...


class LRU:
    """Least recently used goes first.

    `victim` passes over what may not be evicted, which was used last and so lies at the far end: it looks at more
    than a few keys only when hardly any may be evicted.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int) -> None:
        self._order[key] = None

    def touch(self, key: int) -> None:
        self._order.move_to_end(key)

    def remove(self, key: int) -> None:
        del self._order[key]

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        return next((key for key in self._order if evictable(key)), None)

    def keys(self) -> Iterable[int]:
        return self._order.keys()


def make_policy(name: str, slots: int) -> Policy:
    """A policy for a tier of `slots`. Raises ValueError for an unknown name."""
    if name == "lru":
        return LRU()
    raise ValueError(f"unknown replacement policy {name!r}; known: lru")
