"""The disk tier: batches of random record reads.

No mmap of the table: an I/O error there is a signal that kills the process, here it is an error of one read. O_DIRECT,
where the file system has it, keeps the table out of the page cache and the page cache out of the figures.

Reads that a step waits for are started in the kernel by `submit` itself and taken from there by `finished`, without a
thread in between. Those that nobody waits for yet (`background`) are for the pool's threads, which go on while the
caller is busy elsewhere. The pool does both where reads are buffered or asynchronous ones are refused.
"""

import errno
import mmap
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from tolserve.tol.disk.aio import AsyncReader, ReadAt
from tolserve.tol.disk.pagecache import resident_share
from tolserve.tol.disk.reads import CLOSED, HANGING, Job, Read, ReaderPool, ReadRequest
from tolserve.tol.manifest import PAGE, Group
from tolserve.tol.table import Table, TableError

IO = Literal["direct", "buffered"]
# A disk gives most of its throughput from 8 to 32 reads on, measured in benchmarks/results/disk-cpu.json.
READ_DEPTH = 32
# Threads for background reads beside asynchronous ones. More leave the disk less room for the reads that are waited
# for: while 300 background reads are queued, two others take 0.84 ms beside 4 threads, 1.48 beside 8, 1.76 beside 16,
# for 0.22, 0.25 and 0.26 GB/s in the background (98,304 bytes each, busy machine), and 42 ms if all share one queue.
_BACKGROUND = 4
# A disk that is slow for seconds still gets to finish; one that hangs does not keep the process from ending.
CLOSE_SECONDS = 3.0
# Reads that are over are taken in this many turns, so that others start while the first of them are checked.
_TURNS = 4
# What a file system without O_DIRECT answers, at the opening or at the first read.
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)


def _extents(groups: Sequence[Group]) -> dict[range, tuple[int, int]]:
    """First byte in the record, and bytes, of all consecutive groups."""
    return {
        range(first, last): (
            groups[first].offset,
            groups[last - 1].offset + groups[last - 1].bytes - groups[first].offset,
        )
        for first in range(len(groups))
        for last in range(first + 1, len(groups) + 1)
    }


class DiskSource:
    """Reads parts of records of a table, up to `depth` at the same time. Every request leads to exactly one `Read`.

    One thread calls everything here. `io` is what is really used: "direct" falls back to "buffered" where the file
    system refuses it. Raises TableError if a shard cannot be opened, ValueError for another `io` or a `depth` below 1.
    """

    def __init__(self, table: Table, io: str = "direct", depth: int = READ_DEPTH) -> None:
        if io not in ("direct", "buffered"):
            raise ValueError(f"io is {io!r}; it must be 'direct' or 'buffered'")
        if depth < 1:
            raise ValueError(f"read depth is {depth}; at least one read must be allowed")
        self._table = table
        self._depth = depth
        self._fds: list[int] = []
        self.io: IO = "direct" if io == "direct" and self._open(os.O_DIRECT) else "buffered"
        if self.io == "buffered":
            self._open(0)
        # Covering pages of a record, which may start anywhere in its first page.
        buffer_bytes = -(-(table.manifest.record_bytes + PAGE) // PAGE) * PAGE
        self._async: AsyncReader | None = None
        if self.io == "direct":
            with suppress(OSError):  # refused: the pool reads everything
                # Twice as many buffers as reads: the next reads start before those that are over are checked.
                self._async = AsyncReader(depth, 2 * depth, buffer_bytes, at_once=-(-depth // _TURNS))
        self._pool = ReaderPool(min(depth, _BACKGROUND) if self._async else depth, buffer_bytes)
        self._extents = _extents(table.manifest.groups)
        self._free = list(range(2 * depth))
        self._reading: dict[int, Job] = {}  # by buffer
        self._waiting: deque[Job] = deque()
        self._pending = 0  # submitted and not told yet
        self._last: list[Read] = []  # reads whose end came with `close`
        self._closed = False
        self._peak = 0

    def _open(self, flag: int) -> bool:
        """Open every shard; False, with none left open, when the system refuses `flag`."""
        for shard in self._table.manifest.shards:
            file = self._table.path / shard.file
            try:
                self._fds.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC | flag))
                refused = bool(flag) and _refuses_direct(self._fds[-1], shard.data_start)
            except OSError as error:
                refused = bool(flag) and error.errno in _REFUSALS
                if not refused:
                    self._close_files()
                    raise TableError(f"{file} cannot be read: {error}") from error
            if refused:
                self._close_files()
                return False
        return True

    @property
    def asynchronous(self) -> bool:
        """Whether reads that are not `background` are asynchronous."""
        return self._async is not None

    @property
    def peak_outstanding(self) -> int:
        """The most reads that ever were on their way at once, asynchronous or by threads."""
        return max(self._peak, self._pool.peak)

    def cached_share(self) -> float | None:
        """Share of a sample of the table's pages that lie in the page cache now; None if the system does not tell."""
        return resident_share([self._table.path / shard.file for shard in self._table.manifest.shards])

    def describe(self) -> str:
        """How reads are done and what the page cache has to do with it, for people."""
        if self.io == "direct":
            how = "asynchronous" if self.asynchronous else "by threads"
            return f"direct reads, {how}, up to {self._depth} at once; the page cache is bypassed"
        share = self.cached_share()
        known = "of unknown state" if share is None else f"which holds {share:.0%} of the table"
        return f"buffered reads through the page cache, {known}, up to {self._depth} at once"

    def submit(self, reads: Sequence[ReadRequest]) -> None:
        """Start a step's reads, all at once. Does not wait for the disk.

        Raises ValueError, with none started, for groups that a record does not have; RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError(CLOSED)
        jobs = [self._job(request) for request in reads]
        self._pending += len(jobs)
        for job in jobs:
            if self._async is None or job.request.background:
                self._pool.submit(job)
            else:
                self._waiting.append(job)
        self._start()

    def _job(self, request: ReadRequest) -> Job:
        extent = self._extents.get(request.groups)
        if extent is None:
            raise ValueError(f"{request.groups} are no consecutive groups of the table's records")
        begin, size = extent
        shard, offset = self._table.locate(request.token)
        offset += begin
        start = offset // PAGE * PAGE
        length = -(-(offset + size) // PAGE) * PAGE - start
        return Job(self._table, request, self._fds[shard], start, length, offset - start, size)

    def _start(self) -> None:
        """Bring as many waiting reads on their way as the depth allows."""
        if self._async is None or not self._waiting:
            return
        batch: list[ReadAt] = []
        now = time.perf_counter()
        while self._waiting and self._free and self._async.running + len(batch) < self._depth:
            job, buffer = self._waiting.popleft(), self._free.pop()
            job.started = job.started or now
            self._reading[buffer] = job
            batch.append(ReadAt(buffer, job.fd, job.offset, job.length))
        if batch:
            self._async.start(batch)
            self._peak = max(self._peak, self._async.running)

    def finished(self, block: bool) -> list[Read]:
        """The reads that are over since the last call; with `block` at least one, and then it waits for the reads
        that were not submitted as `background` first. Raises RuntimeError when it would wait for nothing."""
        if block and not self._pending:
            raise RuntimeError("no read is on its way")
        while True:
            reads, self._last = self._last, []
            reads += self._pool.over(block=False)
            reads += self._reap(None if block and not reads else 0.0)
            if block and not reads and not self._reading:
                reads += self._pool.over(block=True)
            if reads or not block:
                self._pending -= len(reads)
                return reads

    def _reap(self, seconds: float | None) -> list[Read]:
        """Check and deliver the asynchronous reads that are over, waiting up to `seconds` for one if there is any."""
        if self._async is None or not self._reading:
            return []
        reads: list[Read] = []
        for _ in range(_TURNS):
            over = [(self._reading.pop(buffer), buffer, got) for buffer, got in self._async.over(seconds)]
            self._start()
            for job, buffer, got in over:
                read = job.settle(got, self._async.buffers[buffer])
                self._free.append(buffer)
                if read is None:
                    self._waiting.appendleft(job)
                else:
                    reads.append(read)
            self._start()
            if len(over) < self._async.at_once:
                break
            seconds = 0.0
        return reads

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """Finish the running reads, fail the queued ones, close the files; `finished` then tells of all of them.

        Reads that still run after `patience` seconds are failed as well and never delivered. A second time does
        nothing.
        """
        if self._closed:
            return
        self._closed = True
        deadline = time.perf_counter() + patience
        self._fail_waiting()
        while self._reading and (left := deadline - time.perf_counter()) > 0:
            self._last += self._reap(left)
        self._fail_waiting()  # what was to be tried again
        self._last += [job.given_up(HANGING) for job in self._reading.values()]
        if self._async is not None and not self._reading:
            self._async.close()  # else it is left to the end of the process: closing would wait
        self._reading.clear()
        self._last += self._pool.close(max(0.0, deadline - time.perf_counter()))
        self._close_files()

    def _fail_waiting(self) -> None:
        self._last += [job.given_up(CLOSED) for job in self._waiting]
        self._waiting.clear()

    def _close_files(self) -> None:
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)
        self._fds.clear()


def _refuses_direct(fd: int, offset: int) -> bool:
    """Whether reading a page is refused. If it fails otherwise, that is one record's fault, found by who needs it."""
    try:
        os.preadv(fd, [mmap.mmap(-1, PAGE)], offset)
    except OSError as error:
        return error.errno in _REFUSALS
    return False
