"""The device tier: which record lies in which slot, who may be evicted, and what is on its way.

One thread, the engine's, calls everything here. Reader threads only move bytes into slots that this thread has set
aside for them; it notices their arrival (`poll`) and only then counts and maps them as present.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np

from tolserve.metrics import Metrics
from tolserve.tol.arena import Device
from tolserve.tol.counters import Counters
from tolserve.tol.disk import READ_DEPTH
from tolserve.tol.fills import Fills
from tolserve.tol.lease import Lease, RecordsUnavailable
from tolserve.tol.part import Cause, Part
from tolserve.tol.slotmap import Maps
from tolserve.tol.table import Bytes, Table, TableError
from tolserve.tol.tiers import TierOptions, Tiers
from tolserve.tol.view import EVICTIONS_KEPT, DeviceView, RecordState, Resident, Tier

__all__ = ["Lease", "Pager", "RecordsUnavailable"]

# `preload` keeps this many reads queued per reader, so that none idles and the queue stays short.
_PRELOAD_QUEUE = 4


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
        head_factor: float | None = None,
        io: str = "direct",
        read_depth: int = READ_DEPTH,
        mapped: bool = False,
        metrics: Metrics,
    ) -> None:
        """Sizes in records; the other options and what it raises are those of tiers.Tiers and TierOptions."""
        options = TierOptions(device, policy, frequent, head_factor, io, read_depth, mapped)
        self._count = Counters(metrics)
        self._leases: list[Lease] = []
        self._untold: list[tuple[Hashable, Sequence[int], bool]] = []  # not heard of by the policies; whether they run
        self._unused: set[int] = set()  # prefetched and not asked for yet
        self._uses: Counter[int] = Counter()  # steps that asked for the record since it came in
        self._last_step: dict[int, None] = {}  # tokens of the lease released last
        self._evicted: deque[int] = deque(maxlen=EVICTIONS_KEPT)
        self._use(Tiers(table, device_slots, host_slots, options, self._count))

    def _use(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self.table, self.parts, self.disk, self.host = tiers.table, tiers.parts, tiers.disk, tiers.host
        self.maps = tiers.maps
        self._fills = Fills(tiers.table, tiers.parts, tiers.host, tiers.disk, self._count)
        self._set_sizes()

    def _set_sizes(self) -> None:
        self.slots = self._tiers.slots
        self._count.slots.set(self.slots, "device")
        self._count.slots.set(self.host.slots, "host")
        self._count.record_bytes.set(self.table.manifest.record_bytes)

    @property
    def device_bytes(self) -> int:
        """Payload bytes that the device tier has room for."""
        return self._tiers.device_bytes

    @property
    def read_seconds(self) -> float:
        """What reading a record from disk takes, a running mean."""
        return self._fills.read_seconds

    def part_of(self, group: int) -> int:
        """Index of the part that holds a layer group."""
        return next(index for index, part in enumerate(self.parts) if group in part.groups)

    def advance(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Tell the policies that the step at hand runs these tokens of a sequence, all, in order.

        A token that runs again, in a step after a failed one or after a preemption, is told once. The policies hear of
        it before they next name a victim, as a rule when the step is released: its reads are started first.
        """
        self._untold.append((sequence, tokens, True))

    def recall(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Tell the policies that these tokens of a sequence come before those that run next, and do not run: their
        keys and values were kept. The policies hear of it when they hear of what runs."""
        self._untold.append((sequence, tokens, False))

    def _tell(self) -> None:
        for policy in self._tiers.policies() if self._untold else ():
            for sequence, tokens, run in self._untold:
                (policy.advance if run else policy.recall)(sequence, tokens)
        self._untold.clear()

    def end(self, sequence: Hashable) -> None:
        """Tell the policies that a sequence is over; one that never ran is no error."""
        self._tell()
        for policy in self._tiers.policies():
            policy.end(sequence)

    def present(self, token: int) -> bool:
        """Whether the record is in the device tier, or on its way there."""
        return all(token in part.slot_of for part in self.parts)

    def acquire(self, tokens: Sequence[int], past: Mapping[int, Lease] | None = None) -> Lease:
        """Pin the records of a step's tokens and start the missing reads, all at once.

        Repeated tokens count once. Blocks only when the slots it needs are taken by reads that nobody waits for, until
        one of them is through. Raises ValueError, with nothing changed, when the tokens do not fit beside those of
        other leases (split the step), or for a token outside the vocabulary.

        `past` says under which leases some of the tokens were looked up before, for the same use. These leases, whose
        steps are over, are released, and what is still there of those tokens is not counted again.

        The policies hear of it when the lease is released, after the reads were started and the step was launched.
        """
        self._land(block=False)
        wanted = self._distinct(tokens)
        past = past if past is not None else {}
        earlier = set(past.values())
        pins = {token for lease in self._leases if lease not in earlier for token in lease.tokens if lease.holds(token)}
        others = len(pins - wanted.keys())
        if len(wanted) + others > self.slots:
            raise ValueError(
                f"{len(wanted)} distinct tokens do not fit into {self.slots} slots of which {others} are pinned by "
                "other steps; split the step"
            )
        lease = Lease(self.bring, wanted)
        self._leases.append(lease)
        try:
            for each in earlier:  # now that the new one pins what is still wanted
                self.release(each, over=True)
            self._claim(lease, past)
        except BaseException:
            self.release(lease)
            raise
        return lease

    def publish(self, wait: bool = False) -> None:
        """Bring the device's maps up to date; with `wait` the current stream waits for copies that still run."""
        self._land(block=False)
        self._mapped().publish(wait)

    def reach(self, token: int) -> bool:
        """Whether a step that is launched between the last `publish` and the next finds the record."""
        return self._mapped().reach(token)

    def launch_blind(self) -> None:
        """A step is launched now whose tokens the host does not know: until `settle` nothing changes in the tiers."""
        self._mapped().blind = True

    def _mapped(self) -> Maps:
        if self.maps is None:
            raise RuntimeError("this pager keeps no maps on the device")
        return self.maps

    def settle(self, tokens: Sequence[int], held: Sequence[int] = ()) -> Lease:
        """`acquire` for the step that was launched blind, now that its tokens are known. Ask `reach` before it:
        that is what the step saw.

        A record that it reads in host memory stays there until the release, which copies it up: a miss without a stall.
        That goes for `held` tokens too, which the step runs as well and which another lease has. What it was blocked is
        `unreported` of the lease.
        """
        maps = self._mapped()
        maps.blind = False
        in_place = [token for token in self._distinct([*tokens, *held]) if maps.in_place(token)]
        for token in in_place:
            self.host.lend(token)
        try:
            lease = self.acquire(tokens)
        except BaseException:
            for token in in_place:
                self.host.give_back(token, None)
            raise
        lease.in_place = in_place
        self._stalled(lease, lease.unreported)
        return lease

    def _claim(self, lease: Lease, past: Mapping[int, Lease]) -> None:
        tokens = lease.tokens
        for index, part in enumerate(self.parts):
            slots = {token: part.slot_of.get(token, -1) for token in tokens}
            lease.slots.append(slots)
            if -1 in slots.values():
                for token, slot in slots.items():
                    if slot < 0:
                        lease.absent.setdefault(token, []).append(index)
        self._join(lease)
        arriving = {fill.token for fill in lease.fills}.difference(lease.absent)
        lease.hits = frozenset(tokens).difference(lease.absent, arriving)
        asked = past.keys() - lease.absent.keys()
        self._count.lookups.add(len(tokens) - len(lease.absent) - len(asked))
        self._count.hits.add(len(lease.hits - asked))
        self._count.misses.add(len(arriving - asked), "inflight")
        if asked:
            lease.hits = (lease.hits - asked).union(token for token in asked if token in past[token].hits)
        if lease.absent:
            self._demand(lease)

    def _join(self, lease: Lease) -> None:
        """Let the lease wait for the fills that are on their way already."""
        for part in self.parts:
            if part.arriving:
                found = (part.arriving.get(token) for token in lease.tokens)
                lease.fills += dict.fromkeys(fill for fill in found if fill is not None and fill not in lease.fills)

    def _demand(self, lease: Lease) -> None:
        """Start the fills of a step's missing records; what lies in the host tier is copied by `bring`."""
        if self.host.policies():
            self._tell()  # a bounded host tier names a victim for each read that it keeps
        misses: Counter[str] = Counter()
        try:
            for token, parts in lease.absent.items():
                while not self._room(parts, self._evictable):
                    self._fills.submit()
                    started = time.perf_counter()
                    self._land(block=True)
                    lease.unreported += time.perf_counter() - started
                for fill in self._fills.start(token, parts, "demand"):
                    lease.fills.append(fill)
                    for index, slot in fill.slots.items():
                        lease.slots[index][token] = slot
                misses[fill.source] += 1
        finally:
            self._fills.submit()
            self._count.lookups.add(misses.total())
            for source, count in misses.items():
                self._count.misses.add(count, source)

    def prefetch(self, tokens: Sequence[int]) -> int:
        """Start reading records that a coming step will ask for; returns how many were started.

        Takes free slots, then those of the oldest records that are neither pinned, nor prefetched and not used yet,
        nor among `tokens`; stops quietly when there are none. No lookup. Never blocks.
        """
        self._land(block=False)
        wanted = self._distinct(tokens)
        absent = {token: self._absent(token) for token in wanted}
        for part in self.parts:
            for token in wanted:
                if token in part.slot_of and token not in self._unused:
                    part.policy.touch(token)

        def evictable(token: int) -> bool:
            return token not in wanted and self._spare(token)

        return self._fetch({token: parts for token, parts in absent.items() if parts}, evictable, "prefetch")

    def _fetch(self, absent: dict[int, list[int]], evictable: Callable[[int], bool], cause: Cause) -> int:
        """Start fills that no step waits for, until there is no room; returns how many."""
        started = 0
        for token, parts in absent.items():
            if not self._room(parts, evictable):
                break
            for fill in self._fills.start(token, parts, cause):
                self._fills.copy(fill)
            started += 1
            if cause == "prefetch":
                self._unused.add(token)
        self._fills.submit()
        return started

    @property
    def prefetched(self) -> int:
        """Records that were prefetched and that no step has asked for yet."""
        return len(self._coming())

    @property
    def ahead(self) -> int:
        """Those of them that are still on their way: the step that asks for them will wait."""
        return len(self._coming().intersection(chain.from_iterable(part.arriving for part in self.parts)))

    def _coming(self) -> set[int]:
        return self._unused.difference(*(lease.tokens for lease in self._leases))

    def unneeded(self, tokens: Iterable[int]) -> None:
        """The step that these were prefetched for will not come: from now on they are ordinary records."""
        for token in self._coming().intersection(tokens):
            self._unused.remove(token)
            for part in self.parts:
                part.policy.touch(token)

    def preload(self, tokens: Iterable[int] | None = None) -> None:
        """Fill free slots with these records, first ones first, and wait until they are there.

        None means all token ids from 0 on: the whole table where it fits, else the ids that a BPE vocabulary made
        first, which are roughly the frequent ones. A record that cannot be read is counted and left out: whoever
        needs it will be told.
        """
        for token in self._distinct(range(self.table.manifest.vocab_size) if tokens is None else tokens):
            if not any(part.free for part in self.parts):
                break
            parts = [index for index in self._absent(token) if self.parts[index].free]
            self._fetch({token: parts} if parts else {}, lambda _: False, "preload")
            for index in parts:
                self.parts[index].policy.touch(token)  # it came for no coming step
            while self._fills.reads >= _PRELOAD_QUEUE * self._tiers.options.read_depth:
                self._land(block=True)
        self._drain()
        self.poll()

    def bring(self, lease: Lease, part: int) -> float:
        """What Lease.wait does, but for the errors."""
        if lease not in self._leases:
            raise RuntimeError("the lease was released: its slots may hold other records by now")
        waited, lease.unreported = lease.unreported, 0.0
        self._land(block=False)
        last = range(len(self.parts))[part]
        if pending := [fill for fill in lease.fills if not fill.landed and min(fill.slots) <= last]:
            started = time.perf_counter()
            for fill in pending:
                self._fills.copy(fill)
            while not all(fill.landed for fill in pending):
                self._land(block=True)
            waited += time.perf_counter() - started
        for index in range(last + 1):
            self.parts[index].ready(lease.slots[index].values())
        self._stalled(lease, waited)
        return waited

    def _stalled(self, lease: Lease, seconds: float) -> None:
        """A step waited so long for its records."""
        if seconds:
            self._count.stall_seconds.add(seconds)
            self._count.stalled_steps.add(0 if lease.stalled else 1)
            lease.stalled = True

    def release(self, lease: Lease, over: bool = False) -> None:
        """Give up a step's records; a second time does nothing.

        On CUDA, call it after the step was launched, with the step's stream current: the slots are overwritten only
        behind what is on that stream now. If the step is `over`, they need not be. Reads still on their way go on, and
        their slots are theirs until then.
        """
        if lease not in self._leases:
            return
        for token in lease.in_place:
            self.host.give_back(token, None)
        for fill in lease.fills:
            self._fills.copy(fill)
        self._tell()
        self._leases.remove(lease)
        self._last_step = lease.tokens
        self._unused.difference_update(lease.tokens)
        self._uses.update(token for token in lease.tokens if token not in lease.lost)
        # As tol/policy/base.py says: what was there, then what came in for this step.
        order = [*(token for token in lease.tokens if token not in lease.absent), *lease.absent]
        for part, slots in zip(self.parts, lease.slots, strict=False):
            if not over:
                part.read_by(slots.values())
            policy = part.policy
            for token in order:
                if token in part.slot_of and token not in lease.lost:
                    policy.touch(token)
        self.poll()
        for part in self.parts:
            while len(part.free) < part.spare and self._evict(part, self._spare):
                pass

    def poll(self) -> None:
        """Take note of the fills that have arrived, and refresh the gauges."""
        self._land(block=False)
        for part in self.parts:
            part.tidy()
        self._count.slots_used.set(len(self.parts[-1].slot_of), "device")
        self._count.slots_used.set(self.host.used, "host")
        self._count.slots_pinned.set(self.pinned, "device")
        self._count.slots_pinned.set(self.host.reserved, "host")

    @property
    def pinned(self) -> int:
        """Records that leases hold."""
        return len({token for lease in self._leases for token in lease.tokens if lease.holds(token)})

    def _distinct(self, tokens: Iterable[int]) -> dict[int, None]:
        wanted = dict.fromkeys(tokens)
        vocab_size = self.table.manifest.vocab_size
        if wanted and not (min(wanted) >= 0 and max(wanted) < vocab_size):
            raise ValueError(f"tokens {min(wanted)} to {max(wanted)} are not all among the table's {vocab_size}")
        return wanted

    def _absent(self, token: int) -> list[int]:
        return [index for index, part in enumerate(self.parts) if token not in part.slot_of]

    def _held(self, token: int) -> bool:
        return any(lease.holds(token) for lease in self._leases)

    def _evictable(self, token: int) -> bool:
        return not self._held(token)

    def _spare(self, token: int) -> bool:
        return token not in self._unused and not self._held(token)

    def _room(self, parts: list[int], evictable: Callable[[int], bool]) -> bool:
        """Whether each of the parts has a free slot, or one was made by an eviction."""
        for index in parts:
            part = self.parts[index]
            if not part.free and not self._evict(part, evictable):
                return False
        return True

    def _evict(self, part: Part, evictable: Callable[[int], bool]) -> bool:
        """Evict one record from a part; False when none may be."""
        self._tell()
        victim = part.policy.victim(lambda token: token not in part.arriving and evictable(token))
        if victim is None:
            return False
        self._forget(part, victim)
        self._count.evictions.add(1, "device")
        if part is self.parts[-1]:
            self._evicted.appendleft(victim)
        return True

    def _forget(self, part: Part, token: int) -> None:
        part.forget(token)
        self._unused.discard(token)
        if part is self.parts[-1]:
            self._uses.pop(token, None)

    def _land(self, block: bool) -> None:
        """Take note of the reads that are over: their records are there now, or their slots are free again.

        With `block` it waits for one, and something must be on its way. Raises what a delivery raised, after all of
        them were noted.
        """
        if self.maps is not None and self.maps.blind:
            raise RuntimeError("a step runs whose tokens are not known: settle it before anything changes")
        landed = self._fills.land(block)
        for fill in landed:
            if fill.error is not None:
                for index in fill.slots:
                    self._forget(self.parts[index], fill.token)
                for lease in self._leases:
                    if fill in lease.fills:
                        lease.lost.add(fill.token)
        for fill in landed:
            if fill.fault is not None:
                raise fill.fault

    def _drain(self) -> None:
        while self._fills.reads:
            self._land(block=True)

    def resize(self, *, device_slots: int | None = None, host_slots: int | None = None) -> None:
        """Change the tiers' sizes, in records, between two steps; the records that would be evicted last stay. A tier
        whose size is None is left alone: it needs no second memory.

        Raises ValueError for sizes that cannot be, MemoryError when the new memory does not fit beside the old;
        nothing is changed then.
        """
        self._quiesce()
        self._count.evictions.add(self._tiers.resize(device_slots, host_slots), "device")
        there = self.parts[-1].slot_of
        self._unused = {token for token in self._unused if self.present(token)}
        self._uses = Counter({token: uses for token, uses in self._uses.items() if token in there})
        self._set_sizes()
        self.poll()

    def reopen(self, table: Table) -> None:
        """Go on with another version of the table, between two steps: the tiers keep their bytes and are filled anew
        with the records that would have been evicted last.

        Raises TableError for a table of other weights, or that cannot be opened; nothing is changed then.
        """
        old, new = self.table.manifest, table.manifest
        shapes = [(m.vocab_size, m.num_layers, m.hidden_size) for m in (old, new)]
        if new.fingerprint != old.fingerprint or shapes[0] != shapes[1]:
            raise TableError(f"{table.path} holds the rows of other weights (fingerprint {new.fingerprint})")
        self._quiesce()
        latest = list(self.parts[-1].policy.keys())[::-1]
        past = self._tiers
        self._use(past.reopened(table, self._count))
        past.close()
        self._unused.clear()
        self._uses.clear()
        self.preload(latest)

    def _quiesce(self) -> None:
        if self._leases:
            raise RuntimeError("a step holds records: tiers change between two steps alone")
        self._drain()
        self.quiet()

    def quiet(self) -> None:
        """Wait for copies that were launched and for steps that still read, one whose tokens stay unknown included."""
        for part in self.parts:
            part.arena.quiet()
        if self.maps is not None:
            self.maps.blind = False

    def view(self, limit: int) -> DeviceView:
        """The `limit` records that would be evicted last, and what was evicted lately."""
        self.poll()
        part = self.parts[-1]
        latest = reversed(part.policy.keys(limit))
        residents = [Resident(token, self._uses[token], self._state(token)) for token in latest]
        return DeviceView(part.slots, len(part.slot_of), residents, list(self._evicted))

    def peek(self, token: int) -> tuple[Bytes, Tier]:
        """A copy of a record uint8 [record_bytes], and the nearest tier that holds it, for people: no lookup, no use of
        it, and nothing moves. Raises ValueError for a token outside the vocabulary, RecordError when it must be read
        and cannot be."""
        self._distinct([token])
        if self._there(token):
            return np.concatenate([part.read(token) for part in self.parts]), "device"
        if token in self.host:
            return self.host.peek(token).copy(), "host"
        return self.table.read_record(token), "disk"

    def latest(self, limit: int) -> list[int]:
        """Tokens whose records are in the device tier, whole, at most `limit`; first those evicted last."""
        return [token for token in reversed(self.parts[-1].policy.keys(limit)) if self._there(token)]

    def _there(self, token: int) -> bool:
        return all(token in part.slot_of and token not in part.arriving for part in self.parts)

    def _state(self, token: int) -> RecordState:
        if any(token in part.arriving for part in self.parts):
            return "arriving"
        return "pinned" if token in self._last_step or self._held(token) else "resident"

    def check(self) -> None:
        """Raises RuntimeError when maps, free lists, pins, policies and counters disagree, naming what does."""
        self.poll()
        self.host.check()
        misses = sum(sample.value for sample in self._count.misses.samples)
        found = [problem for part in self.parts for problem in part.problems()]
        leased = [
            (slots, part, lease) for lease in self._leases for slots, part in zip(lease.slots, self.parts, strict=False)
        ]
        wrong = {
            "a pinned record has no slot or another slot than its lease says": any(
                part.slot_of.get(token) != slot
                for slots, part, lease in leased
                for token, slot in slots.items()
                if lease.holds(token)
            ),
            "an evicted record counts as prefetched": not all(
                any(token in part.slot_of for part in self.parts) for token in self._unused
            ),
            "lookups are not hits and misses": self._count.lookups.labels().value
            != self._count.hits.labels().value + misses,
        }
        if found := found + [problem for problem, is_so in wrong.items() if is_so]:
            raise RuntimeError(f"device tier: {'; '.join(found)}")

    def close(self) -> None:
        """Finish the running reads, give up the queued ones, close the files. A lease that needs one of those fails."""
        self.disk.close()
        self.poll()
        self.host.close()
