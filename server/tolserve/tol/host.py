"""The host tier: a bounded private arena of records in RAM, above the disk and below the device tier.

Inclusive: a record read from disk for the device tier is kept here too, so that it is near after its eviction there.
"""

import numpy as np

from tolserve.metrics import Metric
from tolserve.tol.policy.base import Policy
from tolserve.tol.table import Bytes


class HostTier:
    """`slots` records of `record_bytes`, exactly. Used by one thread; reader threads only fill what was reserved."""

    def __init__(self, slots: int, record_bytes: int, policy: Policy, evictions: Metric) -> None:
        self.slots = slots
        self._records = np.empty((slots, record_bytes), np.uint8)  # pages are taken from the system when first written
        self.policy = policy
        self._evictions = evictions
        self._free = list(range(slots))
        self._slot_of: dict[int, int] = {}
        self._reserved: set[int] = set()

    @property
    def used(self) -> int:
        return len(self._slot_of)

    @property
    def reserved(self) -> int:
        return len(self._reserved)

    def __contains__(self, key: int) -> bool:
        return key in self._slot_of and key not in self._reserved

    def get(self, key: int) -> Bytes:
        """The record uint8 [record_bytes] as it lies here, valid until the next `reserve`. Counts as a use."""
        self.policy.touch(key)
        return self._records[self._slot_of[key]]

    def reserve(self, key: int) -> Bytes | None:
        """Room for a record that is about to be read, protected until `settle`. None if there is no room."""
        if not self._free:
            victim = self.policy.victim(lambda other: other not in self._reserved)
            if victim is None:
                return None
            self._remove(victim)
            self._evictions.add(1, "host")
        slot = self._slot_of[key] = self._free.pop()
        self._reserved.add(key)
        self.policy.insert(key)
        return self._records[slot]

    def settle(self, key: int, arrived: bool) -> None:
        """The read of `key` is over: what did not arrive is forgotten. Nothing happens if there was no room for it."""
        if key in self._reserved:
            self._reserved.remove(key)
            if not arrived:
                self._remove(key)

    def _remove(self, key: int) -> None:
        self.policy.remove(key)
        self._free.append(self._slot_of.pop(key))

    def check(self) -> None:
        """Raises RuntimeError when map, free list and policy disagree."""
        if sorted([*self._free, *self._slot_of.values()]) != list(range(self.slots)):
            raise RuntimeError("host tier: slots are lost or used twice")
        if set(self.policy.keys()) != self._slot_of.keys() or not self._reserved <= self._slot_of.keys():
            raise RuntimeError("host tier: the policy does not know the records that are there")
