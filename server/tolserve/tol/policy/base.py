"""What a replacement policy is.

**The order of calls.** A policy's decisions follow from the order of its calls alone. One step of a tier makes them in
this order, and so does tol/replay.py:

1. `advance`, once for each sequence that runs; before it `recall`, if tokens before these were skipped;
2. `touch` for each record that is there, in the order of the step's tokens;
3. for each that is missing, in the same order: if the tier is full `victim` and `remove`, then `insert` and `touch`.
   None of the step's own records may be named;
4. after the step, `end` for each sequence that is over.

**When they are made is free.** Nothing above needs to happen before a step's reads are submitted, except that a read
needs a slot. A pager that keeps F of its slots free looks a step's tokens up in its own maps, reads the missing records
into free slots, and makes the calls of 1 to 3 while the reads run; the victims' slots are the free ones of the next
step. Its hits are exactly those of a replay with F fewer slots, as long as the calls keep their order: if a step misses
more than F records, those calls come first that are still owed, then its own, each `victim` before the read that needs
the slot. What is owed from one step must be paid before `end`, `prefetch`, `resize` or the next step's calls.

tol/pager.py goes further: it inserts a step's new records when their reads have started, after the victims that had to
be named for them, and names the victims for the next step after all touches, the step's own records among the
candidates. Under `lru` that is the same.
`s3fifo` and `context` then decide otherwise now and then: by less than 0.003 points of the hit rate on the trace that
`context` was tuned on, 32 sequences, 4,096 and 16,384 slots.
"""

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

    def keys(self, last: int | None = None) -> list[int]:
        """All of them, first the one that would be evicted first if all may be; or only the `last` of these."""
        ...

    def resize(self, slots: int) -> None:
        """The tier holds at most so many from now on. What must go for that is asked for by `victim`, as ever."""

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        """A step runs these tokens of a sequence, all of them, in order. The first call begins the sequence."""

    def recall(self, sequence: Hashable, keys: Sequence[int]) -> None:
        """These tokens of a sequence come before those that the step runs, and need not run. It may begin so."""

    def end(self, sequence: Hashable) -> None:
        """The sequence is over; one that never began is no error."""


class Oblivious:
    """The part of a policy that knows nothing of sequences."""

    def advance(self, sequence: Hashable, keys: Sequence[int]) -> None:
        pass

    def recall(self, sequence: Hashable, keys: Sequence[int]) -> None:
        pass

    def end(self, sequence: Hashable) -> None:
        pass


def tail(keys: Iterable[int], last: int | None) -> list[int]:
    """The `last` of some keys, in their order; all for None."""
    keys = list(keys)
    return keys if last is None else keys[max(0, len(keys) - last) :]
