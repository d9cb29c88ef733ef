"""Who is evicted. A policy orders keys; it knows neither slots nor bytes."""

from collections.abc import Sequence

from tolserve.tol.policy.base import Policy
from tolserve.tol.policy.context import Context
from tolserve.tol.policy.lru import LRU, Pinned
from tolserve.tol.policy.s3fifo import S3FIFO

NEED_FREQUENCIES = ("static", "half-pinned")
POLICIES = ("lru", "s3fifo", *NEED_FREQUENCIES, "context")

# A static cache keeps a sixteenth of its slots for what is not in the list: a step's records must all have a slot.
_PASSING_SHARE = 16


def _all_but_passing(slots: int) -> int:
    return slots - -(-slots // _PASSING_SHARE)


def _half(slots: int) -> int:
    return slots // 2


_PINNED = {"static": _all_but_passing, "half-pinned": _half}


def make_policy(name: str, slots: int, frequent: Sequence[int] | None = None) -> Policy:
    """A policy for a tier of `slots`. `frequent` are distinct keys, the most frequent first.

    Raises ValueError for an unknown name, and for one that needs `frequent` without it.
    """
    match name:
        case "lru":
            return LRU()
        case "s3fifo":
            return S3FIFO(slots)
        case "context":
            return Context()
        case "static" | "half-pinned":
            if frequent is None:
                raise ValueError(f"the replacement policy {name!r} needs a frequency list")
            return Pinned(frequent, _PINNED[name], slots)
    raise ValueError(f"unknown replacement policy {name!r}; known: {', '.join(POLICIES)}")


def pinned_slots(name: str, slots: int) -> int:
    """How many of the most frequent keys a policy pins in a tier of `slots`."""
    return _PINNED[name](slots) if name in _PINNED else 0
