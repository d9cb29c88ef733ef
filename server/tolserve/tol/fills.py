"""How records come up: from the disk by reads, from the host tier by a copy."""

import time
from collections.abc import Sequence

from tolserve.tol.arena import Event
from tolserve.tol.counters import Counters
from tolserve.tol.disk import DiskSource, Read, ReadRequest
from tolserve.tol.disk.reads import Deliver
from tolserve.tol.host import Host
from tolserve.tol.part import Cause, Fill, Part
from tolserve.tol.table import Bytes, RecordError, Table

_READS_REMEMBERED = 32  # about ten steps with misses: soon true again when the disk gets busier


class Fills:
    """The fills of a device tier in `parts`. Reads run by themselves once submitted; copies are made by `copy`, when
    somebody needs them. Both are noted by the one thread that calls all this."""

    def __init__(self, table: Table, parts: Sequence[Part], host: Host, disk: DiskSource, count: Counters) -> None:
        self.table, self.parts, self.host, self.disk = table, parts, host, disk
        self._count = count
        self._reads: dict[tuple[int, int, int], Fill] = {}  # token, first group, end of groups
        self._requests: list[ReadRequest] = []
        self._coming: list[Fill] = []  # theirs
        self.read_seconds = 0.0  # a running mean

    @property
    def reads(self) -> int:
        """Reads on their way."""
        return len(self._reads)

    def start(self, token: int, parts: Sequence[int], cause: Cause) -> list[Fill]:
        """Give the parts of a record a free slot each, which they must have.

        One read brings all of them from the disk, and starts at the next `submit`; until then the parts do not know of
        it. From the host tier each part is a fill of its own, which waits for `copy`.
        """
        if token not in self.host:
            fill = Fill(token, "disk", cause, {index: self.parts[index].free.pop() for index in parts})
            self._requests.append(self._request(fill))
            self._coming.append(fill)
            return [fill]
        fills = [Fill(token, "host", cause, {index: self.parts[index].free.pop()}) for index in parts]
        for fill in fills:
            fill.record = self.host.lend(token)
            self._assign(fill)
        return fills

    def _assign(self, fill: Fill) -> None:
        for index, slot in fill.slots.items():
            self.parts[index].assign(fill.token, slot, fill)

    def _request(self, fill: Fill) -> ReadRequest:
        """The read of a record's missing parts, or of all of it if the host tier will keep it."""
        keep = self.host.reserve(fill.token)
        fill.kept = keep is not None
        groups = range(len(self.table.manifest.groups))
        if keep is None:
            groups = groups[self.parts[min(fill.slots)].groups.start : self.parts[max(fill.slots)].groups.stop]
        self._reads[fill.token, groups.start, groups.stop] = fill
        return ReadRequest(fill.token, groups, self._deliver(fill, groups, keep), background=fill.cause != "demand")

    def _deliver(self, fill: Fill, groups: range, keep: Bytes | None) -> Deliver:
        """May run in a reader thread, and so touches nothing but its own bytes."""
        base = self.table.manifest.groups[groups.start].offset
        targets = [(index, self.parts[index], slot) for index, slot in fill.slots.items()]

        def deliver(payload: Bytes) -> dict[int, Event | None]:
            if keep is not None:
                keep[:] = payload
            return {index: part.write(slot, payload, base) for index, part, slot in targets}

        return deliver

    def submit(self) -> None:
        """Start the reads that were asked for since the last time, all at once."""
        if self._requests:
            requests, self._requests = self._requests, []
            coming, self._coming = self._coming, []
            self.disk.submit(requests)  # first: the disk works while the rest is written down
            for fill in coming:
                self._assign(fill)

    def copy(self, fill: Fill) -> None:
        """Bring a part of a record from the host tier; nothing if that was done."""
        if fill.record is None:
            return
        started = time.perf_counter()
        ((index, slot),) = fill.slots.items()
        part = self.parts[index]
        event = part.write(slot, fill.record, stays=True)
        self.host.give_back(fill.token, event)
        fill.landed, fill.record = True, None
        part.arrived(fill.token, event)
        self._arrived(fill, time.perf_counter() - started, part.bytes)

    def land(self, block: bool) -> list[Fill]:
        """The reads that are over since the last time: their records are there now, or failed and are to be forgotten.

        With `block` it waits for one, and something must be on its way.
        """
        if not self._reads and not block:
            return []
        return [self._note(read) for read in self.disk.finished(block)]

    def _note(self, read: Read) -> Fill:
        fill = self._reads.pop((read.token, read.groups.start, read.groups.stop))
        fill.landed = True
        fill.error, fill.fault = read.error, read.fault
        if fill.fault is not None:
            fill.error = RecordError(read.token, "io", f"it was read but not delivered: {fill.fault!r}")
        for kind in read.failures:
            self._count.read_errors.add(1, kind)
        if fill.kept:
            self.host.settle(read.token, arrived=fill.error is None)
        if fill.error is None:
            for index in fill.slots:
                self.parts[index].arrived(read.token, read.delivered[index])
            self._arrived(fill, read.seconds, read.bytes)
            self.read_seconds += (read.seconds - self.read_seconds) / _READS_REMEMBERED
        return fill

    def _arrived(self, fill: Fill, seconds: float, size: int) -> None:
        self._count.fills.add(1, fill.source, fill.cause)
        self._count.fill_seconds.observe(seconds, fill.source)
        self._count.read_bytes.add(size, fill.source)
