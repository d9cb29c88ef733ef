"""Least recently used, alone and behind pinned keys."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import chain

from tolserve.tol.policy.base import Evictable, Oblivious


class LRU(Oblivious):
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

    def victim(self, evictable: Evictable) -> int | None:
        return next((key for key in self._order if evictable(key)), None)

    def keys(self) -> Iterable[int]:
        return self._order.keys()


class Pinned(Oblivious):
    """Keys of a list stay once they came in; the others share the slots that are left, least recently used first.

    A listed key goes only when no other may be evicted, the last of the list first.
    """

    def __init__(self, listed: Sequence[int]) -> None:
        self._rank = {key: rank for rank, key in enumerate(listed)}
        self._listed = list(listed)
        self._others = LRU()
        self._pinned: set[int] = set()
        self._last: list[int] = []  # heap of negative ranks, each pinned key's once, and some of removed keys

    def insert(self, key: int) -> None:
        if key in self._rank:
            self._pinned.add(key)
            heappush(self._last, -self._rank[key])
        else:
            self._others.insert(key)

    def touch(self, key: int) -> None:
        if key not in self._rank:
            self._others.touch(key)

    def remove(self, key: int) -> None:
        if key in self._rank:
            self._pinned.remove(key)
        else:
            self._others.remove(key)

    def victim(self, evictable: Evictable) -> int | None:
        if (other := self._others.victim(evictable)) is not None:
            return other
        passed: list[int] = []
        found = None
        while self._last and found is None:
            entry = heappop(self._last)
            key = self._listed[-entry]
            if key in self._pinned and entry not in passed[-1:]:
                passed.append(entry)
                found = key if evictable(key) else None
        for entry in passed:
            heappush(self._last, entry)
        return found

    def keys(self) -> Iterable[int]:
        return chain(self._others.keys(), sorted(self._pinned, key=self._rank.__getitem__, reverse=True))
