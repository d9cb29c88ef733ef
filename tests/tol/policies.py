"""Slow, obvious twins of the replacement policies: plain lists, every score computed anew."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from tolserve.tol.policy.context import REPEAT, SHARE

Evictable = Callable[[int], bool]


class SlowLRU:
    def __init__(self) -> None:
        self.order: list[int] = []

    def insert(self, key: int) -> None:
        self.order.append(key)

    def touch(self, key: int) -> None:
        self.order.remove(key)
        self.order.append(key)

    def remove(self, key: int) -> None:
        self.order.remove(key)

    def victim(self, evictable: Evictable) -> int | None:
        return ([key for key in self.keys() if evictable(key)] or [None])[0]

    def keys(self) -> list[int]:
        return list(self.order)

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None: ...

    def recall(self, sequence: Hashable, keys: Sequence[int]) -> None: ...

    def end(self, sequence: Hashable) -> None: ...

    def resize(self, slots: int) -> None: ...


class SlowPinned(SlowLRU):
    """`kept_free` of a number of slots is how many are for keys that are not pinned."""

    def __init__(self, listed: list[int], kept_free: Callable[[int], int], slots: int) -> None:
        super().__init__()
        self.all_listed, self.kept_free = listed, kept_free
        self.listed = listed[: slots - kept_free(slots)]

    def resize(self, slots: int) -> None:
        others = [key for key in self.order if key not in self.listed]
        pinned = [key for key in reversed(self.listed) if key in self.order]
        self.order = others + pinned
        self.listed = self.all_listed[: slots - self.kept_free(slots)]

    def keys(self) -> list[int]:
        pinned = [key for key in reversed(self.listed) if key in self.order]
        return [key for key in self.order if key not in self.listed] + pinned


class SlowS3FIFO(SlowLRU):
    def __init__(self, slots: int) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.uses: dict[int, int] = {}
        self.resize(slots)

    def resize(self, slots: int) -> None:
        self.room = max(1, slots // 10)
        self.ghost_room = slots - self.room
        self.ghosts = self.ghosts[-self.ghost_room :] if self.ghost_room else []

    def insert(self, key: int) -> None:
        (self.main if key in self.ghosts else self.small).append(key)
        self.ghosts = [ghost for ghost in self.ghosts if ghost != key]
        self.uses[key] = -1

    def touch(self, key: int) -> None:
        self.uses[key] = min(3, self.uses[key] + 1)

    def remove(self, key: int) -> None:
        if key in self.small:
            self.ghosts = ([*self.ghosts, key])[-self.ghost_room :] if self.ghost_room else []
        self.small = [other for other in self.small if other != key]
        self.main = [other for other in self.main if other != key]

    def victim(self, evictable: Evictable) -> int | None:
        if len(self.small) >= self.room:
            found = self.of_small(evictable)
            return self.of_main(evictable) if found is None else found
        found = self.of_main(evictable)
        return self.of_small(evictable) if found is None else found

    def of_small(self, evictable: Evictable) -> int | None:
        for key in list(self.small):
            if self.uses[key] > 1:
                self.small.remove(key)
                self.main.append(key)
                self.uses[key] = 0
            elif evictable(key):
                return key
        return None

    def of_main(self, evictable: Evictable) -> int | None:
        at = 0
        while at < len(self.main):
            key = self.main[at]
            if self.uses[key] > 0:
                self.uses[key] -= 1
                self.main.append(self.main.pop(at))
            elif evictable(key):
                return key
            else:
                at += 1
        return None

    def keys(self) -> list[int]:
        return self.small + self.main


class SlowContext(SlowLRU):
    """Remembers everything that ran, and sums it up at each question."""

    def __init__(self, half_life: float, window: int) -> None:
        super().__init__()
        self.half_life, self.window = half_life, window
        self.ran: list[tuple[int, float, float]] = []  # token, tokens before it, what it counts
        self.tokens = 0
        self.recent: dict[Hashable, list[int]] = {}
        self.unused: set[int] = set()

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        recent = self.recent.setdefault(sequence, [])
        for key in keys:
            self.ran.append((key, self.tokens, REPEAT if key in recent[-self.window :] else 1.0))
            recent.append(key)
        self.tokens += len(keys)

    def recall(self, sequence: Hashable, keys: Sequence[int]) -> None:
        self.recent.setdefault(sequence, []).extend(keys)

    def end(self, sequence: Hashable) -> None:
        self.recent.pop(sequence, None)

    def insert(self, key: int) -> None:
        super().insert(key)
        self.unused.add(key)

    def touch(self, key: int) -> None:
        self.unused.discard(key)

    def remove(self, key: int) -> None:
        super().remove(key)
        self.unused.discard(key)

    def keys(self) -> list[int]:
        counted: Counter[int] = Counter()
        total = 0.0
        for key, at, weight in self.ran:
            grown = weight * 2.0 ** (at / self.half_life)
            counted[key] += grown  # type: ignore[assignment]
            total += grown
        near = Counter(key for recent in self.recent.values() for key in recent[-self.window :])
        near.update(self.unused)
        weight = SHARE * total / (self.window * max(1, len(self.recent)))
        return sorted(
            self.order, key=lambda key: (counted[key] + weight * near[key], near[key], float(counted[key]), -key)
        )
