"""S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023)."""

from collections import OrderedDict

from tolserve.tol.policy.base import Evictable, Oblivious, tail

# The paper's: a tenth of the slots for newcomers, uses counted up to 3, more than one to be promoted.
_SMALL_SHARE = 10
_MOST_USES = 3
_PROMOTING_USES = 2


class S3FIFO(Oblivious):
    """Newcomers pass through a small queue; those used again, or evicted from it lately, go to the main queue.

    `keys` gives the small queue and then the main one, each oldest first; uses may still reorder them.
    """

    def __init__(self, slots: int) -> None:
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}  # since it came in; -1 until its first use, which it came for
        self.resize(slots)

    def resize(self, slots: int) -> None:
        self._small_slots = max(1, slots // _SMALL_SHARE)
        self._ghosts_kept = max(0, slots - self._small_slots)
        self._forget_ghosts()

    def _forget_ghosts(self) -> None:
        while len(self._ghosts) > self._ghosts_kept:
            self._ghosts.popitem(last=False)

    def insert(self, key: int) -> None:
        queue = self._main if key in self._ghosts else self._small
        self._ghosts.pop(key, None)
        queue[key] = None
        self._uses[key] = -1

    def touch(self, key: int) -> None:
        self._uses[key] = min(self._uses[key] + 1, _MOST_USES)

    def remove(self, key: int) -> None:
        del self._uses[key]
        if key in self._main:
            del self._main[key]
            return
        del self._small[key]
        self._ghosts[key] = None
        self._forget_ghosts()

    def victim(self, evictable: Evictable) -> int | None:
        searches = [self._from_small, self._from_main]
        if len(self._small) < self._small_slots:
            searches.reverse()
        return next((key for search in searches if (key := search(evictable)) is not None), None)

    def _from_small(self, evictable: Evictable) -> int | None:
        promoted: list[int] = []
        found = None
        for key in self._small:
            if self._uses[key] >= _PROMOTING_USES:
                promoted.append(key)
            elif evictable(key):
                found = key
                break
        for key in promoted:
            del self._small[key]
            self._main[key] = None
            self._uses[key] = 0
        return found

    def _from_main(self, evictable: Evictable) -> int | None:
        passed: list[int] = []
        found = None
        while self._main:
            key = next(iter(self._main))
            if self._uses[key] > 0:
                self._uses[key] -= 1
                self._main.move_to_end(key)
            elif evictable(key):
                found = key
                break
            else:
                passed.append(key)
                del self._main[key]
        for key in reversed(passed):
            self._main[key] = None
            self._main.move_to_end(key, last=False)
        return found

    def keys(self, last: int | None = None) -> list[int]:
        return tail([*self._small, *self._main], last)
