"""Least recently used, alone and behind pinned keys."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from tolserve.tol.policy.base import Evictable, Oblivious, tail


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

    def keys(self, last: int | None = None) -> list[int]:
        return tail(self._order, last)

    def resize(self, slots: int) -> None:
        pass


class Pinned(Oblivious):
    """The first keys of a list stay once they came in, as many as `share` gives of the slots; the others share what is
    left, least recently used first.

    A pinned key goes only when no other may be evicted, the last of the list first. Those that `resize` unpins
    count as used last, the first of the list as the very last.
    """

    def __init__(self, listed: Sequence[int], share: Callable[[int], int], slots: int) -> None:
        """`share` of a number of slots is how many of them are for pinned keys."""
        self._rank = {key: rank for rank, key in enumerate(listed)}
        self._listed = list(listed)
        self._share = share
        self._ranks_pinned = share(slots)
        self._others = LRU()
        self._pinned: set[int] = set()
        self._last: list[int] = []  # heap of negative ranks, each pinned key's once, and some of removed keys

    def _pins(self, key: int) -> bool:
        return self._rank.get(key, self._ranks_pinned) < self._ranks_pinned

    def resize(self, slots: int) -> None:
        residents = self.keys()
        self._ranks_pinned = self._share(slots)
        self._others, self._pinned, self._last = LRU(), set(), []
        for key in residents:
            self.insert(key)

    def insert(self, key: int) -> None:
        if self._pins(key):
            self._pinned.add(key)
            heappush(self._last, -self._rank[key])
        else:
            self._others.insert(key)

    def touch(self, key: int) -> None:
        if not self._pins(key):
            self._others.touch(key)

    def remove(self, key: int) -> None:
        if self._pins(key):
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

    def keys(self, last: int | None = None) -> list[int]:
        pinned = sorted(self._pinned, key=self._rank.__getitem__, reverse=True)
        return tail([*self._others.keys(), *pinned], last)
