"""One part of the device tier: the slots for some of a record's layer groups, and which token lies in which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tolserve.tol.arena import Device, DeviceArena, Event
from tolserve.tol.manifest import Manifest
from tolserve.tol.policy import make_policy
from tolserve.tol.policy.base import Policy
from tolserve.tol.slotmap import SlotMap
from tolserve.tol.table import Bytes, RecordError

Source = Literal["host", "disk"]
Cause = Literal["demand", "prefetch", "preload"]

# Slots that a part keeps free between steps, a 256th of all: at 4,096 slots and 32 sequences a step has 6 misses on
# average and 16 hardly ever. On a recorded trace it costs 0.02 to 0.05 points of the hit rate.
SPARE_SHARE = 256


@dataclass(eq=False, slots=True)
class Fill:
    """A record, or parts of it, on its way into a slot of each part; `error` says why it did not arrive, once it has
    landed."""

    token: int
    source: Source
    cause: Cause
    slots: dict[int, int] = field(default_factory=dict)  # by part
    landed: bool = False
    error: RecordError | None = None
    fault: Exception | None = None  # what its delivery raised: ours, not the table's
    record: Bytes | None = None  # lent by the host tier until it is copied
    kept: bool = False  # the read goes into the host tier too


class Part:
    """Slots for the layer groups `groups`: `bytes` from byte `offset` of a record.

    A token is in `slot_of` from the moment its bytes are asked for, and in `arriving` until they are there. `map` is
    for steps that look records up on the device.
    """

    def __init__(
        self,
        groups: range,
        offset: int,
        size: int,
        slots: int,
        vocab_size: int,
        policy: Policy,
        device: Device,
        mapped: bool,
    ) -> None:
        self.groups, self.offset, self.bytes = groups, offset, size
        self.slots, self._vocab_size, self._policy = slots, vocab_size, policy
        self.arena = DeviceArena(slots, size, device)
        self.map = SlotMap(vocab_size, device) if mapped else None
        self.slot_of: dict[int, int] = {}
        self.arriving: dict[int, Fill] = {}  # by token
        self.free = list(range(slots - 1, -1, -1))
        self._unheard: list[int] = []  # tokens that the policy has not heard of
        self._fences: dict[int, Event] = {}  # behind the last step that read the slot
        self._copies: dict[int, Event] = {}  # slots whose fill may still be copying on the device

    @property
    def spare(self) -> int:
        """Slots to keep free between steps, so that a step finds room without asking who must go."""
        return spare_slots(self.slots, self._vocab_size)

    def assign(self, token: int, slot: int, fill: Fill) -> None:
        """Promise a free slot to a token that `fill` will bring."""
        self.slot_of[token] = slot
        self.arriving[token] = fill
        self._unheard.append(token)

    @property
    def policy(self) -> Policy:
        """The order of the records. It hears of new ones when it is next asked for, as a rule after a step's reads were
        started: the step does not wait for that."""
        for token in self._unheard:
            self._policy.insert(token)
        self._unheard.clear()
        return self._policy

    def write(self, slot: int, payload: Bytes, base: int = 0, stays: bool = False) -> Event | None:
        """Copy this part's bytes into a slot, behind its last reader. Any thread may call it.

        `payload` is a record from its byte `base` on; `stays` is DeviceArena.write's.
        """
        mine = payload[self.offset - base : self.offset - base + self.bytes]
        return self.arena.write(slot, mine, self._fences.get(slot), stays)

    def read(self, token: int) -> Bytes:
        """A copy of this part's bytes of a record that is there."""
        slot = self.slot_of[token]
        self.ready([slot])
        return self.arena.read(slot)

    def arrived(self, token: int, event: Event | None) -> None:
        """The bytes of a token are there, or will be once `event` is through."""
        del self.arriving[token]
        if event is not None:
            self._copies[self.slot_of[token]] = event
        if self.map is not None:
            self.map.put(token, self.slot_of[token], event)

    def forget(self, token: int) -> None:
        slot = self.slot_of.pop(token)
        self.arriving.pop(token, None)
        self.policy.remove(token)
        self._copies.pop(slot, None)
        if self.map is not None:
            self.map.remove(token)
        self.free.append(slot)

    def read_by(self, slots: Iterable[int]) -> None:
        """A step that reads these slots was launched: they are overwritten only behind it."""
        if (fence := self.arena.fence()) is not None:
            self._fences.update(dict.fromkeys(slots, fence))

    def ready(self, slots: Iterable[int]) -> None:
        """Order the device's work behind the copies into these slots."""
        if self._copies:
            self.arena.ready([self._copies[slot] for slot in slots if slot in self._copies])

    def tidy(self) -> None:
        """Forget the copies that are through."""
        if self._copies:
            self._copies = {slot: event for slot, event in self._copies.items() if not event.query()}

    def move(self, arena: DeviceArena) -> int:
        """Go on in another arena, with the records that would be evicted last; returns how many had to go.

        Nothing may be arriving, and no step may hold a slot.
        """
        order = list(self.policy.keys())
        gone = order[: max(0, len(order) - arena.slots)]
        for token in gone:
            self.forget(token)
        kept = order[len(gone) :]
        arena.copy(self.arena, [self.slot_of[token] for token in kept])
        self.arena, self.slots = arena, arena.slots
        self.slot_of = {token: slot for slot, token in enumerate(kept)}
        self.free = list(range(self.slots - 1, len(kept) - 1, -1))
        self._fences.clear()
        self._copies.clear()
        if self.map is not None:
            self.map.reset(self.slot_of)
        self.policy.resize(self.slots)
        return len(gone)

    def problems(self) -> list[str]:
        """What disagrees among maps, free list and policy."""
        wrong = {
            "a slot is lost or used twice": sorted([*self.free, *self.slot_of.values()]) != list(range(self.slots)),
            "the policy does not know the records that are there": set(self.policy.keys()) != self.slot_of.keys(),
            "a record is on its way to no slot": not self.arriving.keys() <= self.slot_of.keys(),
        }
        return [f"groups {list(self.groups)}: {problem}" for problem, is_so in wrong.items() if is_so]


def spare_slots(slots: int, vocab_size: int) -> int:
    """Of a tier's `slots`, those that are kept free; none where every record has one."""
    return slots // SPARE_SHARE if slots < vocab_size else 0


def part_slots(manifest: Manifest, records: int, head_factor: float | None) -> list[tuple[range, int]]:
    """How the bytes of `records` whole records are shared out: the layer groups of each part, and its slots.

    One part takes whole records. With `head_factor`, the first layer group has a part of its own with that many times
    as many slots as the rest, as far as the vocabulary goes: its rows are needed first, so they had better be there.
    """
    every = range(len(manifest.groups))
    records = min(records, manifest.vocab_size)
    if head_factor is None or len(every) == 1:
        return [(every, records)]
    size, head = records * manifest.record_bytes, manifest.groups[0].bytes
    rest = manifest.record_bytes - head
    tail_slots = max(1, int(size / (rest + head_factor * head)))
    head_slots = min(manifest.vocab_size, (size - tail_slots * rest) // head)
    tail_slots = min(manifest.vocab_size, (size - head_slots * head) // rest)
    return [(every[:1], head_slots), (every[1:], tail_slots)]


def make_parts(
    manifest: Manifest,
    records: int,
    *,
    head_factor: float | None,
    policy: str,
    frequent: Sequence[int] | None,
    device: Device,
    mapped: bool,
) -> list[Part]:
    """The device tier of a table, in parts that together take the bytes of `records` records.

    Raises ValueError for an unknown policy or device, MemoryError when the device has no room.
    """
    parts = []
    for groups, slots in part_slots(manifest, records, head_factor):
        first, last = manifest.groups[groups.start], manifest.groups[groups.stop - 1]
        size = last.offset + last.bytes - first.offset
        order = make_policy(policy, slots, frequent)
        parts.append(Part(groups, first.offset, size, slots, manifest.vocab_size, order, device, mapped))
    return parts
