"""The host tier: a bounded private arena of records in RAM, above the disk and below the device tier.

Inclusive: a record read from disk for the device tier is kept here too, so that it is near after its eviction there.
"""

from collections import Counter
from typing import Protocol

from tolserve.metrics import Metric
from tolserve.tol.arena import Device, Event, HostMemory
from tolserve.tol.policy.base import Policy
from tolserve.tol.slotmap import SlotMap
from tolserve.tol.table import Bytes


class Host(Protocol):
    """What the pager asks of records in RAM, whether they are some (HostTier) or all (shared.WholeTable)."""

    slots: int
    memory: HostMemory
    map: SlotMap | None  # for steps that read records in place

    @property
    def used(self) -> int: ...

    @property
    def reserved(self) -> int: ...

    def __contains__(self, token: int) -> bool: ...

    def peek(self, token: int) -> Bytes:
        """The record uint8 [record_bytes] as it lies here now; no use of it, and no promise that it stays."""
        ...

    def lend(self, token: int) -> Bytes:
        """The record uint8 [record_bytes] as it lies here, which it does until it is given back. Counts as a use."""
        ...

    def give_back(self, token: int, copy: Event | None) -> None:
        """`copy` is the copy out of it, which may still run."""

    def policies(self) -> list[Policy]: ...

    def resize(self, slots: int) -> None:
        """Raises ValueError for a size that it cannot take, MemoryError when there is no room; unchanged then."""

    def reserve(self, token: int) -> Bytes | None:
        """Room for a record that is about to be read, protected until `settle`. None if it will not be kept."""
        ...

    def settle(self, token: int, arrived: bool) -> None:
        """The read of `token` is over: what did not arrive is forgotten. Nothing happens if nothing was reserved."""

    def check(self) -> None:
        """Raises RuntimeError when maps, free list and policy disagree."""

    def close(self) -> None:
        """Give the memory back."""


class HostTier:
    """`slots` records of `record_bytes`, exactly. Used by one thread; reader threads only fill what was reserved.

    For a CUDA device the memory is pinned. Raises MemoryError when it cannot be had.
    """

    def __init__(
        self,
        slots: int,
        record_bytes: int,
        policy: Policy,
        evictions: Metric,
        device: Device,
        records: SlotMap | None = None,
    ) -> None:
        self.slots, self.map = slots, records
        self._device, self._record_bytes = device, record_bytes
        self.memory = HostMemory(slots, record_bytes, device)
        self.policy = policy
        self._evictions = evictions
        self._ever_used = slots > 0
        self._free = list(range(slots))
        self._slot_of: dict[int, int] = {}
        self._reserved: set[int] = set()
        self._lent: Counter[int] = Counter()
        self._copies: dict[int, list[Event]] = {}  # out of a slot, perhaps still running

    @property
    def used(self) -> int:
        return len(self._slot_of)

    @property
    def reserved(self) -> int:
        return len(self._reserved)

    def __contains__(self, token: int) -> bool:
        return token in self._slot_of and token not in self._reserved

    def peek(self, token: int) -> Bytes:
        return self.memory.records[self._slot_of[token]]

    def lend(self, token: int) -> Bytes:
        self.policy.touch(token)
        self._lent[token] += 1
        return self.memory.records[self._slot_of[token]]

    def give_back(self, token: int, copy: Event | None) -> None:
        self._lent[token] -= 1
        if not self._lent[token]:
            del self._lent[token]
        if copy is not None:
            slot = self._slot_of[token]
            self._copies[slot] = [copy, *(event for event in self._copies.get(slot, ()) if not event.query())]

    def policies(self) -> list[Policy]:
        return [self.policy] if self._ever_used else []  # being told costs time

    def _evictable(self, token: int) -> bool:
        return token not in self._reserved and token not in self._lent

    def reserve(self, token: int) -> Bytes | None:
        if not self.slots or token in self._slot_of:  # another part of it is being read right now
            return None
        if not self._free:
            victim = self.policy.victim(self._evictable)
            if victim is None:
                return None
            self._remove(victim)
            self._evictions.add(1, "host")
        slot = self._slot_of[token] = self._free.pop()
        for event in self._copies.pop(slot, ()):
            event.synchronize()
        self._reserved.add(token)
        self.policy.insert(token)
        return self.memory.records[slot]

    def settle(self, token: int, arrived: bool) -> None:
        if token in self._reserved:
            self._reserved.remove(token)
            if not arrived:
                self._remove(token)
            elif self.map is not None:
                self.map.put(token, self._slot_of[token], None)

    def _remove(self, token: int) -> None:
        self.policy.remove(token)
        if self.map is not None:
            self.map.remove(token)
        self._free.append(self._slot_of.pop(token))

    def resize(self, slots: int) -> None:
        """Keeps the records that would be evicted last. Nothing may be reserved or lent."""
        memory = HostMemory(slots, self._record_bytes, self._device)
        order = list(self.policy.keys())
        gone = order[: max(0, len(order) - slots)]
        for token in gone:
            self._remove(token)
        kept = order[len(gone) :]
        for slot, token in enumerate(kept):
            memory.records[slot] = self.memory.records[self._slot_of[token]]
        self.close()
        self.memory, self.slots = memory, slots
        self._slot_of = {token: slot for slot, token in enumerate(kept)}
        self._free = list(range(len(kept), slots))
        self._copies.clear()
        if self.map is not None:
            self.map.reset(self._slot_of)
        self.policy.resize(slots)
        self._ever_used |= slots > 0
        self._evictions.add(len(gone), "host")

    def check(self) -> None:
        if sorted([*self._free, *self._slot_of.values()]) != list(range(self.slots)):
            raise RuntimeError("host tier: slots are lost or used twice")
        if set(self.policy.keys()) != self._slot_of.keys() or not self._reserved <= self._slot_of.keys():
            raise RuntimeError("host tier: the policy does not know the records that are there")
        if not self._lent.keys() <= self._slot_of.keys() - self._reserved:
            raise RuntimeError("host tier: a record is lent that is not there")

    def close(self) -> None:
        for event in (event for events in self._copies.values() for event in events):
            event.synchronize()
        self.memory.close()
