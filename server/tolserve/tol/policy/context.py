"""Evict by what a server knows of its tokens: how many contexts they came up in, and which ones hold them now."""

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from tolserve.tol.policy.base import Evictable

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


@dataclass(eq=False)
class _Window:
    """The last tokens of a sequence."""

    tokens: deque[int] = field(default_factory=deque)
    counts: Counter[int] = field(default_factory=Counter)


class Context:
    """The lowest score goes first: `count + weight x near`; of equals the highest key, which BPE made last.

    `count` is how often the token came up, halved every HALF_LIFE tokens; inside a context that holds it already it
    counts REPEAT. `near` is how often running sequences hold it among their last WINDOW tokens, and one more while it
    is prefetched and not used. `weight` is what makes both estimate the uses to come: the sum of all counts stands for
    all sequences, an occurrence for SHARE of one sequence's next tokens, spread over its window.

    Keys of equal `near` are ordered by count alone, whatever the time. So there is a heap for each value of `near`, and
    the victim is the best of their tops. An entry may lie lower than its key belongs, never higher: counts only grow,
    a key whose `near` falls gets an entry in the lower heap at once, and the rest is put right at the top.
    """

    def __init__(self, half_life: float = HALF_LIFE, window: int = WINDOW) -> None:
        """In tokens."""
        self._half_life, self._window = half_life, window
        self._sequences: dict[Hashable, _Window] = {}
        self._clock = 0.0  # half-lives
        self._counts: dict[int, float] = {}  # in units of 2 ** -clock, as is their sum
        self._total = 0.0
        self._near: dict[int, int] = {}
        self._unused: set[int] = set()
        self._resident: set[int] = set()
        self._heaps: list[list[tuple[float, int]]] = []  # by `near`: (count then, -key)
        self._entries: list[set[int]] = []  # keys with an entry in the heap, each once

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        window = self._sequences.get(sequence)
        if window is None:
            window = self._sequences[sequence] = _Window()
        unit = 2.0**self._clock
        held, tokens, counts, near = window.counts, window.tokens, self._counts, self._near
        for key in keys:
            occurrences = held.get(key, 0)
            weight = unit * REPEAT if occurrences else unit
            held[key] = occurrences + 1
            near[key] = near.get(key, 0) + 1
            counts[key] = counts.get(key, 0.0) + weight
            self._total += weight
            tokens.append(key)
            if len(tokens) > self._window:
                old = tokens.popleft()
                held[old] -= 1
                if not held[old]:
                    del held[old]
                self._lower(old, 1)
        self._clock += len(keys) / self._half_life
        if unit > _RESCALE:
            self._rescale()

    def end(self, sequence: Hashable) -> None:
        if (window := self._sequences.pop(sequence, None)) is not None:
            for key, occurrences in window.counts.items():
                self._lower(key, occurrences)

    def _lower(self, key: int, by: int) -> None:
        near = self._near[key] = self._near[key] - by
        if key in self._resident:
            self._enter(key, near)

    def _enter(self, key: int, near: int) -> None:
        while len(self._heaps) <= near:
            self._heaps.append([])
            self._entries.append(set())
        if key not in self._entries[near]:
            self._entries[near].add(key)
            heappush(self._heaps[near], (self._counts.get(key, 0.0), -key))

    def _rescale(self) -> None:
        self._clock -= 500
        self._total /= _RESCALE
        self._counts = {key: uses / _RESCALE for key, uses in self._counts.items()}
        for number, heap in enumerate(self._heaps):
            self._heaps[number] = [(then / _RESCALE, key) for then, key in heap]
            heapify(self._heaps[number])

    def insert(self, key: int) -> None:
        self._resident.add(key)
        self._unused.add(key)
        near = self._near[key] = self._near.get(key, 0) + 1
        self._enter(key, near)

    def touch(self, key: int) -> None:
        if key in self._unused:
            self._unused.remove(key)
            self._lower(key, 1)

    def remove(self, key: int) -> None:
        self._resident.remove(key)
        self.touch(key)

    def _weight(self) -> float:
        """Of an occurrence, in the unit of the counts."""
        return SHARE * self._total / (self._window * max(1, len(self._sequences)))

    def victim(self, evictable: Evictable) -> int | None:
        weight = self._weight()
        best: tuple[float, int, float, int] | None = None
        for near in count(0):
            # Putting entries right may add heaps at the end.
            if near == len(self._heaps) or (best is not None and weight * near > best[0]):
                break
            if (top := self._top(near, evictable)) is not None:
                candidate = (top[0] + weight * near, near, *top)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else -best[3]

    def _top(self, near: int, evictable: Evictable) -> tuple[float, int] | None:
        """The lowest entry of a heap whose key may be evicted; puts entries right that are not on the way."""
        heap, entries = self._heaps[near], self._entries[near]
        passed: list[tuple[float, int]] = []
        found = None
        while heap:
            then, key = heap[0][0], -heap[0][1]
            if key not in self._resident or self._near[key] != near:
                heappop(heap)
                entries.remove(key)
                if key in self._resident and self._near[key] > near:
                    self._enter(key, self._near[key])
            elif (now := self._counts.get(key, 0.0)) != then:
                heapreplace(heap, (now, -key))
            elif evictable(key):
                found = heap[0]
                break
            else:
                passed.append(heappop(heap))
        for entry in passed:
            heappush(heap, entry)
        return found

    def keys(self) -> Iterable[int]:
        weight = self._weight()

        def rank(key: int) -> tuple[float, int, float, int]:
            uses, near = self._counts.get(key, 0.0), self._near[key]
            return uses + weight * near, near, uses, -key

        return sorted(self._resident, key=rank)
