"""Evict by what a server knows of its tokens: how many contexts they came up in, and which ones hold them now."""

from collections import deque
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf

import numpy as np

from tolserve.tol.policy.base import Evictable, tail

# Chosen on the even documents of a recorded LLaMA-3 trace, second half measured, 10% of the slots, 32 sequences: LRU
# 91.87%, S3-FIFO 92.93%, the optimum 96.27%; benchmarks/replay.py reports the odd documents.
# Half-lives of 0.3, 1, 3, 10 million tokens differ by 0.2 points and hardly from 1 million on.
HALF_LIFE = 3_000_000
# 512, 768, 1,024 tokens: 93.81, 93.86, 93.87%; at 5% of the slots 88.02, 87.89, 87.79%. Longer ones are worse.
WINDOW = 1024
# A token that its own context holds already says little about other contexts. 1, 0.2, 0.1: 93.52, 93.82, 93.87%.
REPEAT = 0.1
# Of a sequence's next tokens, what its window predicts. Less evicts too much of the contexts: 0.3 loses 0.2 points.
SHARE = 1.0
# Counts are kept as if time stood still and the unit grew, so that old ones need no change. Before a float overflows,
# all are scaled down by this power of two, which rounds nothing.
_RESCALE = 2.0**500


# Of a key that does not lie in the tier: below every `near`, so that none seems to fall below it.
_ABSENT = -1


class _Token:
    """What is known of a key, once it came up."""

    __slots__ = ("count", "key", "level", "near")

    def __init__(self, key: int) -> None:
        self.key = key
        self.count = 0.0  # in units of 2 ** -clock
        self.near = 0
        self.level = _ABSENT  # the heap with the entry that stands for it; not above `near`


class _Window:
    """The last tokens of a sequence, and where each of its tokens came up last, by their number in it."""

    __slots__ = ("last", "ran", "tokens")

    def __init__(self) -> None:
        self.tokens: deque[_Token] = deque()
        self.last: dict[int, int] = {}
        self.ran = 0


class Context:
    """The lowest score goes first: `count + weight x near`; of equals the highest key, which BPE made last.

    `count` is how often the token came up, halved every HALF_LIFE tokens; inside a context that holds it already it
    counts REPEAT. What is recalled counts nothing: it is not looked up, but it is a context of what follows. `near` is
    how often running sequences hold it among their last WINDOW tokens, and one more while it is prefetched and not
    used. `weight` is what makes both estimate the uses to come: the sum of all counts stands for
    all sequences, an occurrence for SHARE of one sequence's next tokens, spread over its window.

    Keys of equal `near` are ordered by count alone, whatever the time. So there is a heap for each value of `near`, and
    the victim is the best of their tops. The entry that stands for a key may lie lower than the key belongs, in heap
    and in count, never higher: counts only grow, a key whose `near` falls below its entry gets one in the lower heap
    at once, and the rest is put right at the top. Entries left behind are dropped there.
    """

    def __init__(self, half_life: float = HALF_LIFE, window: int = WINDOW) -> None:
        """In tokens."""
        self._half_life, self._window = half_life, window
        self._sequences: dict[Hashable, _Window] = {}
        self._clock = 0.0  # half-lives
        self._tokens: dict[int, _Token] = {}
        self._total = 0.0  # of all counts
        self._unused: set[int] = set()
        self._resident: dict[int, _Token] = {}
        self._heaps: list[list[tuple[float, int]]] = []  # by level: (count then, -key)
        self._entries: list[set[int]] = []  # keys with an entry in the heap, each once

    def resize(self, slots: int) -> None:
        pass

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        unit = 2.0**self._clock
        self._take(sequence, keys, unit, unit * REPEAT)
        self._clock += len(keys) / self._half_life
        if unit > _RESCALE:
            self._rescale()

    def recall(self, sequence: Hashable, keys: Sequence[int]) -> None:
        self._take(sequence, keys[-self._window :], 0.0, 0.0)

    def _take(self, sequence: Hashable, keys: Sequence[int], unit: float, again: float) -> None:
        """Move a sequence's window on; a key counts `unit`, or `again` if the window holds it."""
        window = self._sequences.get(sequence)
        if window is None:
            window = self._sequences[sequence] = _Window()
        size, never = self._window, -self._window - 1
        known, recent, last, total = self._tokens, window.tokens, window.last, self._total
        for number, key in enumerate(keys, window.ran):
            token = known.get(key)
            if token is None:
                token = known[key] = _Token(key)
            weight = again if last.get(key, never) >= number - size else unit
            last[key] = number
            token.count += weight
            token.near += 1
            total += weight
            recent.append(token)
            if len(recent) > size:
                old = recent.popleft()
                old.near -= 1
                if old.near < old.level:
                    self._enter(old)
        window.ran += len(keys)
        self._total = total

    def end(self, sequence: Hashable) -> None:
        if (window := self._sequences.pop(sequence, None)) is not None:
            for token in window.tokens:
                token.near -= 1
            for token in window.tokens:
                if token.near < token.level:
                    self._enter(token)

    def _enter(self, token: _Token) -> None:
        """Let an entry in the heap of its `near` stand for a key."""
        level = token.level = token.near
        while len(self._heaps) <= level:
            self._heaps.append([])
            self._entries.append(set())
        if token.key not in self._entries[level]:
            self._entries[level].add(token.key)
            heappush(self._heaps[level], (token.count, -token.key))

    def _rescale(self) -> None:
        self._clock -= 500
        self._total /= _RESCALE
        for token in self._tokens.values():
            token.count /= _RESCALE
        for number, heap in enumerate(self._heaps):
            self._heaps[number] = [(then / _RESCALE, key) for then, key in heap]
            heapify(self._heaps[number])

    def insert(self, key: int) -> None:
        token = self._tokens.get(key)
        if token is None:
            token = self._tokens[key] = _Token(key)
        self._resident[key] = token
        self._unused.add(key)
        self._enter(token)  # where its first use will leave it: too low until then, which is allowed
        token.near += 1

    def touch(self, key: int) -> None:
        if key in self._unused:
            self._unused.remove(key)
            token = self._resident[key]
            token.near -= 1
            if token.near < token.level:
                self._enter(token)

    def remove(self, key: int) -> None:
        self.touch(key)
        self._resident.pop(key).level = _ABSENT

    def _weight(self) -> float:
        """Of an occurrence, in the unit of the counts."""
        return SHARE * self._total / (self._window * max(1, len(self._sequences)))

    def victim(self, evictable: Evictable) -> int | None:
        weight = self._weight()
        best: tuple[float, int, float, int] | None = None
        lowest = inf
        near = 0
        # Putting entries right may add heaps at the end.
        while near < len(self._heaps) and weight * near <= lowest:
            heap = self._heaps[near]
            # An entry is never too high: a heap whose top is worse than the best found holds nothing better.
            if heap and heap[0][0] + weight * near <= lowest and (top := self._top(near, evictable)) is not None:
                candidate = (top[0] + weight * near, near, *top)
                if best is None or candidate < best:
                    best, lowest = candidate, candidate[0]
            near += 1
        return None if best is None else -best[3]

    def _top(self, level: int, evictable: Evictable) -> tuple[float, int] | None:
        """The lowest entry of a heap whose key may be evicted; puts entries right that are not on the way."""
        heap, entries = self._heaps[level], self._entries[level]
        passed: list[tuple[float, int]] = []
        found = None
        while heap:
            then, key = heap[0][0], -heap[0][1]
            token = self._tokens[key]
            if token.level != level or token.near != level:
                heappop(heap)
                entries.remove(key)
                if token.level == level:
                    self._enter(token)
            elif token.count != then:
                heapreplace(heap, (token.count, -key))
            elif evictable(key):
                found = heap[0]
                break
            else:
                passed.append(heappop(heap))
        for entry in passed:
            heappush(heap, entry)
        return found

    def keys(self, last: int | None = None) -> list[int]:
        keys = np.fromiter(self._resident, np.int64)
        counts = np.array([token.count for token in self._resident.values()], np.float64)
        near = np.array([token.near for token in self._resident.values()], np.int64)
        scores = counts + self._weight() * near
        if last is not None and 0 < last < len(keys):
            # People who look at the cache ask for a few of many; ordering those alone takes a third of the time.
            chosen = scores >= np.partition(scores, -last)[-last]
            keys, counts, near, scores = keys[chosen], counts[chosen], near[chosen], scores[chosen]
        ranked: list[int] = keys[np.lexsort((-keys, counts, near, scores))].tolist()
        return tail(ranked, last)
