"""The device tier: which record lies in which slot, who may be evicted, and what is on its way.

One thread, the engine's, calls everything here. Reader threads only move bytes into slots that this thread has set
aside for them; it notices their arrival (`poll`) and only then counts and maps them as present.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from tolserve.metrics import Metrics
from tolserve.tol.arena import Device, DeviceArena, Event
from tolserve.tol.counters import Counters
from tolserve.tol.disk import DiskSource, Read, ReadRequest
from tolserve.tol.host import HostTier
from tolserve.tol.policy import make_policy
from tolserve.tol.table import Bytes, RecordError, Table
from tolserve.tol.view import EVICTIONS_KEPT, DeviceView, RecordState, Resident

Cause = Literal["demand", "prefetch", "preload"]

# `preload` keeps this many reads queued per reader, so that none idles and the queue stays short.
_PRELOAD_QUEUE = 4


class RecordsUnavailable(RuntimeError):  # noqa: N818 - says what happened; RecordError is one record's
    """Records that a step needs and that could not be read: `errors` by token."""

    def __init__(self, errors: dict[int, RecordError]) -> None:
        super().__init__("; ".join(str(error) for error in errors.values()))
        self.errors = errors


@dataclass(eq=False)
class _Fill:
    """A record on its way from disk into `slot`; `error` says why it did not arrive, once the fill has landed."""

    token: int
    slot: int
    cause: Cause
    landed: bool = False
    error: RecordError | None = None


class Lease:
    """A step's claim on its records: they stay in their slots until it is released.

    `slot_of` maps each distinct token to its slot; `hits` are those that were in the device tier when asked for.
    """

    def __init__(self, pager: "Pager") -> None:
        self._pager = pager
        self._fills: list[_Fill] = []
        self._unreported = 0.0  # seconds that acquire was blocked, reported by the first wait
        self.slot_of: dict[int, int] = {}
        self.hits: frozenset[int] = frozenset()

    def _pinned(self) -> set[int]:
        """Tokens that it pins: the pins of failed fills were dropped when they landed."""
        return self.slot_of.keys() - {fill.token for fill in self._fills if fill.error is not None}

    def wait(self) -> float:
        """Block until every row is in; on CUDA the current stream then waits for the copies, not the host.

        Returns the seconds that this call waited (the first call adds what `acquire` was blocked), 0.0 when all was
        there. Raises RecordsUnavailable naming the tokens that failed: their slots hold nothing of theirs.
        """
        if self not in self._pager._leases:
            raise RuntimeError("the lease was released: its slots may hold other records by now")
        waited, self._unreported = self._unreported, 0.0
        self._pager.poll()
        pending = [fill for fill in self._fills if not fill.landed]
        if pending:
            started = time.perf_counter()
            for fill in pending:
                while not fill.landed:
                    self._pager._land(block=True)
            waited += time.perf_counter() - started
        self._pager._settle(self, waited)
        if errors := {fill.token: fill.error for fill in self._fills if fill.error is not None}:
            raise RecordsUnavailable(errors)
        return waited


class Pager:
    """Pages records of a table through a device tier of `slots` and, below it, a host tier.

    Keys of slots are token ids. A further namespace of memory (there is one today) would take keys offset by
    vocab_size.
    """

    def __init__(
        self,
        table: Table,
        *,
        device_slots: int,
        host_slots: int,
        device: Device,
        policy: str = "lru",
        frequent: Sequence[int] | None = None,
        io: str = "direct",
        read_depth: int = 8,
        metrics: Metrics,
    ) -> None:
        """Sizes in records; `frequent` tokens are for policies that need them, the most frequent first.

        Raises ValueError for an unknown policy, io, device or a size that cannot be.
        """
        if device_slots < 1 or host_slots < 0:
            raise ValueError(
                f"device cache of {device_slots} and host cache of {host_slots} records: "
                "the device cache needs at least 1, the host cache at least 0"
            )
        manifest = table.manifest
        self.table = table
        self.slots = min(device_slots, manifest.vocab_size)
        self._count = Counters(metrics)
        self._policy = make_policy(policy, self.slots, frequent)
        self._host = HostTier(
            min(host_slots, manifest.vocab_size),
            manifest.record_bytes,
            make_policy(policy, min(host_slots, manifest.vocab_size), frequent),
            self._count.evictions,
        )
        self.arena = DeviceArena(self.slots, manifest.record_bytes, device)
        self.disk = DiskSource(table, io, read_depth)
        self._read_depth = read_depth
        self._slot_of: dict[int, int] = {}  # records that are there or on their way
        self._free = list(range(self.slots - 1, -1, -1))
        self._inflight: dict[int, _Fill] = {}
        self._pins: dict[int, int] = {}  # leases per token, if any
        self._leases: set[Lease] = set()
        self._unused: set[int] = set()  # prefetched and not asked for yet
        self._fences: list[Event | None] = [None] * self.slots  # behind the last step that read the slot
        self._copies: dict[int, Event] = {}  # slots whose fill may still be copying on the device
        self._uses = [0] * self.slots  # steps that asked for the slot's record since it came in
        self._last_step: frozenset[int] = frozenset()  # tokens of the lease released last
        self._evicted: deque[int] = deque(maxlen=EVICTIONS_KEPT)
        self._count.slots.set(self.slots, "device")
        self._count.slots.set(self._host.slots, "host")
        self._count.record_bytes.set(manifest.record_bytes)

    def advance(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Tell the policies that the step about to be acquired runs these tokens of a sequence, all, in order."""
        self._policy.advance(sequence, tokens)
        self._host.policy.advance(sequence, tokens)

    def end(self, sequence: Hashable) -> None:
        """Tell the policies that a sequence is over; one that never ran is no error."""
        self._policy.end(sequence)
        self._host.policy.end(sequence)

    def acquire(self, tokens: Sequence[int]) -> Lease:
        """Pin the records of a step's tokens and start the missing reads, all at once.

        Repeated tokens count once. Blocks only when the slots it needs are taken by reads that nobody waits for, until
        one of them is through. Raises ValueError, with nothing changed, when the tokens do not fit beside those of
        other leases (split the step), or for a token outside the vocabulary.
        """
        self.poll()
        wanted = self._distinct(tokens)
        others = sum(token not in wanted for token in self._pins)
        if len(wanted) + others > self.slots:
            raise ValueError(
                f"{len(wanted)} distinct tokens do not fit into {self.slots} slots of which {others} are pinned by "
                "other steps; split the step"
            )
        lease = Lease(self)
        self._leases.add(lease)
        try:
            self._claim(lease, wanted)
        except BaseException:
            self.release(lease)
            raise
        return lease

    def _claim(self, lease: Lease, wanted: dict[int, None]) -> None:
        present = [token for token in wanted if token in self._slot_of]
        missing = [token for token in wanted if token not in self._slot_of]
        lease._fills += [self._inflight[token] for token in present if token in self._inflight]
        lease.hits = frozenset(token for token in present if token not in self._inflight)
        for token in present:
            self._pin(lease, token)
        self._count.lookups.add(len(present))
        self._count.hits.add(len(lease.hits))
        self._count.misses.add(len(lease._fills), "inflight")
        for token in missing:
            while (slot := self._take_slot(self._evictable)) is None:
                started = time.perf_counter()
                self._land(block=True)
                lease._unreported += time.perf_counter() - started
            fill = self._start(token, slot, "demand")
            self._pin(lease, token)
            if fill is not None:
                lease._fills.append(fill)
            self._count.lookups.add(1)
            self._count.misses.add(1, "host" if fill is None else "disk")

    def _pin(self, lease: Lease, token: int) -> None:
        lease.slot_of[token] = self._slot_of[token]
        self._pins[token] = self._pins.get(token, 0) + 1
        self._uses[self._slot_of[token]] += 1
        self._unused.discard(token)
        self._policy.touch(token)

    def prefetch(self, tokens: Sequence[int]) -> int:
        """Start reading records that a coming step will ask for; returns how many were started.

        Takes free slots, then those of the oldest records that are neither pinned, nor prefetched and not used yet,
        nor among `tokens`; stops quietly when there are none. No lookup. Never blocks.
        """
        self.poll()
        wanted = self._distinct(tokens)
        missing = [token for token in wanted if token not in self._slot_of]
        for token in (token for token in wanted if token in self._slot_of):
            self._policy.touch(token)

        def spare(token: int) -> bool:
            return self._evictable(token) and token not in self._unused and token not in wanted

        for started, token in enumerate(missing):
            if (slot := self._take_slot(spare)) is None:
                return started
            self._start(token, slot, "prefetch")
            self._unused.add(token)
        return len(missing)

    def preload(self, tokens: Iterable[int] | None = None) -> None:
        """Fill free slots with these records, first ones first, and wait until they are there.

        None means all token ids from 0 on: the whole table where it fits, else the ids that a BPE vocabulary made
        first, which are roughly the frequent ones. A record that cannot be read is counted and left out: whoever
        needs it will be told.
        """
        for token in self._distinct(range(self.table.manifest.vocab_size) if tokens is None else tokens):
            if not self._free:
                break
            if token not in self._slot_of:
                self._start(token, self._free.pop(), "preload")
                self._policy.touch(token)  # it came for no coming step
            while len(self._inflight) >= _PRELOAD_QUEUE * self._read_depth:
                self._land(block=True)
        while self._inflight:
            self._land(block=True)
        self.poll()

    def release(self, lease: Lease) -> None:
        """Give up a step's records; a second time does nothing.

        On CUDA, call it after the step was launched, with the step's stream current: the slots are overwritten only
        behind what is on that stream now. Reads still on their way go on, and their slots are theirs until then.
        """
        if lease not in self._leases:
            return
        self._leases.remove(lease)
        self._last_step = frozenset(lease.slot_of)
        fence = self.arena.fence()
        for token in lease._pinned():
            self._fences[lease.slot_of[token]] = fence
            self._pins[token] -= 1
            if not self._pins[token]:
                del self._pins[token]
        self.poll()

    def poll(self) -> None:
        """Take note of the fills that have arrived, and refresh the gauges."""
        self._land(block=False)
        self._copies = {slot: event for slot, event in self._copies.items() if not event.query()}
        self._count.slots_used.set(len(self._slot_of), "device")
        self._count.slots_used.set(self._host.used, "host")
        self._count.slots_pinned.set(len(self._pins), "device")
        self._count.slots_pinned.set(self._host.reserved, "host")

    def _settle(self, lease: Lease, waited: float) -> None:
        """Order the device's work behind the copies of the lease's records, and count its waiting."""
        self.arena.ready(self._copies[slot] for slot in lease.slot_of.values() if slot in self._copies)
        if waited:
            self._count.stall_seconds.add(waited)
            self._count.stalled_steps.add(1)

    def _distinct(self, tokens: Iterable[int]) -> dict[int, None]:
        wanted = dict.fromkeys(tokens)
        vocab_size = self.table.manifest.vocab_size
        if wanted and not (min(wanted) >= 0 and max(wanted) < vocab_size):
            raise ValueError(f"tokens {min(wanted)} to {max(wanted)} are not all among the table's {vocab_size}")
        return wanted

    def _evictable(self, token: int) -> bool:
        return token not in self._pins and token not in self._inflight

    def _take_slot(self, evictable: Callable[[int], bool]) -> int | None:
        """A slot that is free, or freed by an eviction; None when nothing may be evicted."""
        if not self._free:
            victim = self._policy.victim(evictable)
            if victim is None:
                return None
            self._forget(victim)
            self._evicted.appendleft(victim)
            self._count.evictions.add(1, "device")
        return self._free.pop()

    def _forget(self, token: int) -> None:
        slot = self._slot_of.pop(token)
        self._policy.remove(token)
        self._pins.pop(token, None)
        self._unused.discard(token)
        self._copies.pop(slot, None)
        self._free.append(slot)

    def _start(self, token: int, slot: int, cause: Cause) -> _Fill | None:
        """Bring a record into a slot: at once from the host tier, else by a read, which is returned."""
        fence = self._fences[slot]
        fill = None
        if token in self._host:
            started = time.perf_counter()
            record = self._host.get(token)
            self._copied(slot, self.arena.write(slot, record, fence))
            self._count_fill("host", cause, time.perf_counter() - started, record.size)
        else:
            keep = self._host.reserve(token)

            def deliver(payload: Bytes) -> Event | None:
                if keep is not None:
                    keep[:] = payload
                return self.arena.write(slot, payload, fence)

            fill = self._inflight[token] = _Fill(token, slot, cause)
            self.disk.submit([ReadRequest(token, range(len(self.table.manifest.groups)), deliver)])
        self._slot_of[token] = slot
        self._uses[slot] = 0
        self._policy.insert(token)
        return fill

    def _land(self, block: bool) -> None:
        """Take note of the reads that are over: their records are there now, or their slots are free again.

        With `block` it waits for one, and something must be on its way. Raises what a delivery raised, after all of
        them were noted: that is a fault of ours, not of the table.
        """
        reads = self.disk.finished(block)
        for read in reads:
            self._note(read)
        for read in reads:
            if read.fault is not None:
                raise read.fault

    def _note(self, read: Read) -> None:
        fill = self._inflight.pop(read.token)
        fill.landed = True
        fill.error = read.error
        if read.fault is not None:
            fill.error = RecordError(read.token, "io", f"it was read but not delivered: {read.fault!r}")
        for kind in read.failures:
            self._count.read_errors.add(1, kind)
        self._host.settle(read.token, arrived=fill.error is None)
        if fill.error is None:
            self._copied(fill.slot, read.delivered)
            self._count_fill("disk", fill.cause, read.seconds, read.bytes)
        else:
            self._forget(read.token)

    def _copied(self, slot: int, event: Event | None) -> None:
        if event is not None:
            self._copies[slot] = event

    def _count_fill(self, source: str, cause: Cause, seconds: float, size: int) -> None:
        self._count.fills.add(1, source, cause)
        self._count.fill_seconds.observe(seconds, source)
        self._count.read_bytes.add(size, source)

    def view(self, limit: int) -> DeviceView:
        """The `limit` records that would be evicted last, and what was evicted lately."""
        self.poll()
        latest = reversed(list(self._policy.keys()))
        residents = [
            Resident(token, self._uses[self._slot_of[token]], self._state(token)) for token in islice(latest, limit)
        ]
        return DeviceView(self.slots, len(self._slot_of), residents, list(self._evicted))

    def _state(self, token: int) -> RecordState:
        if token in self._inflight:
            return "arriving"
        return "pinned" if token in self._pins or token in self._last_step else "resident"

    def check(self) -> None:
        """Raises RuntimeError when maps, free list, pins and policy disagree, naming what does."""
        self.poll()
        self._host.check()
        pins = Counter(token for lease in self._leases for token in lease._pinned())
        misses = sum(sample.value for sample in self._count.misses.samples)
        wrong = {
            "a slot is lost or used twice": sorted([*self._free, *self._slot_of.values()]) != list(range(self.slots)),
            "the policy does not know the records that are there": set(self._policy.keys()) != self._slot_of.keys(),
            "pins are not those of the leases": self._pins != pins,
            "a pinned record has no slot or another slot than its lease says": any(
                self._slot_of.get(token) != lease.slot_of[token] for lease in self._leases for token in lease._pinned()
            ),
            "a record is on its way to no slot": not self._inflight.keys() <= self._slot_of.keys(),
            "an evicted record counts as prefetched": not self._unused <= self._slot_of.keys(),
            "lookups are not hits and misses": self._count.lookups.labels().value
            != self._count.hits.labels().value + misses,
        }
        if found := [problem for problem, is_so in wrong.items() if is_so]:
            raise RuntimeError(f"device tier: {'; '.join(found)}")

    def close(self) -> None:
        """Finish the running reads, give up the queued ones, close the files. A lease that needs one of those fails."""
        self.disk.close()
        self.poll()
