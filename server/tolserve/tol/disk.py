"""The disk tier: records read by a pool of threads with `preadv`.

No mmap of the table: an I/O error there is a signal that kills the process, here it is an exception in one read.
O_DIRECT, where the file system has it, keeps the table out of the page cache and the page cache out of the figures.
"""

import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tolserve.tol.manifest import PAGE
from tolserve.tol.table import Bytes, ErrorKind, RecordError, Table

IO = Literal["direct", "buffered"]
Deliver = Callable[[Bytes], Any]

# A record is read again once: a bus or network error is often gone by then, and a lasting fault costs one more read.
ATTEMPTS = 2


@dataclass(frozen=True)
class ReadRequest:
    """Consecutive layer groups of a record, read as one range of bytes.

    `deliver(payload)` is called with the verified bytes of those groups; it must copy them out, since the buffer is
    used again. What it returns comes back in `Read.delivered`.
    """

    token: int
    groups: range
    deliver: Deliver


@dataclass(frozen=True)
class Read:
    """How one request went: `error` or `fault` is set if its bytes are not where they were to be delivered."""

    token: int
    groups: range
    seconds: float  # reading, checking and delivering, without the time in the queue
    bytes: int = 0  # moved from the file, whole pages
    failures: tuple[ErrorKind, ...] = ()  # attempts that failed
    error: RecordError | None = None
    fault: Exception | None = None  # what `deliver` raised
    delivered: Any = None  # what `deliver` returned


class DiskSource:
    """Reads records of a table, up to `depth` at the same time. Every request leads to exactly one `Read`.

    Plain queues and no futures: a cold prompt submits hundreds of reads, and a future's locks cost more than its read.
    `io` is what is really used: "direct" falls back to "buffered" where the file system refuses it.
    `peak_outstanding` is the most reads that ever ran at once. Raises OSError if a shard cannot be opened.
    """

    def __init__(self, table: Table, io: str = "direct", depth: int = 8) -> None:
        if io not in ("direct", "buffered"):
            raise ValueError(f"io is {io!r}; it must be 'direct' or 'buffered'")
        if depth < 1:
            raise ValueError(f"read depth is {depth}; at least one read must be allowed")
        self._table = table
        self._fds: list[int] = []
        self.io: IO = "direct" if io == "direct" and self._open(os.O_DIRECT) else "buffered"
        if self.io == "buffered":
            self._open(0)
        self._jobs: queue.SimpleQueue[ReadRequest | None] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Read] = queue.SimpleQueue()
        self._closing = False
        self._lock = threading.Lock()
        self._outstanding = 0
        self.peak_outstanding = 0
        # Daemons: a read that hangs in the kernel must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, name="tol-read", daemon=True) for _ in range(depth)]
        for thread in self._threads:
            thread.start()

    def _open(self, flag: int) -> bool:
        """Open every shard and try a page of it; False, with none left open, when the system refuses `flag`."""
        probe = mmap.mmap(-1, PAGE)
        try:
            for shard in self._table.manifest.shards:
                self._fds.append(os.open(self._table.path / shard.file, os.O_RDONLY | os.O_CLOEXEC | flag))
                if flag:
                    os.preadv(self._fds[-1], [probe], shard.data_start)
        except OSError as error:
            self._close_files()
            if flag and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
        return True

    def submit(self, reads: Sequence[ReadRequest]) -> None:
        """Start a step's reads, all at once. Never waits for the disk. Raises ValueError for groups that are none."""
        for request in reads:
            self._extent(request)
        for request in reads:
            self._jobs.put(request)

    def finished(self, block: bool) -> list[Read]:
        """The reads that are over since the last call, in the order of their ends; with `block` at least one.

        Blocks for ever when nothing was submitted.
        """
        reads: list[Read] = []
        with suppress(queue.Empty):
            while True:
                reads.append(self._finished.get(block and not reads))
        return reads

    def _extent(self, request: ReadRequest) -> tuple[int, int]:
        """Where in the record the request's groups start, and their bytes."""
        every, groups = self._table.manifest.groups, request.groups
        if groups.step != 1 or not 0 <= groups.start < groups.stop <= len(every):
            raise ValueError(f"{groups} are no consecutive groups of a record with {len(every)}")
        first, last = every[groups.start], every[groups.stop - 1]
        return first.offset, last.offset + last.bytes - first.offset

    def _work(self) -> None:
        # Covering pages of a record, which may start anywhere in its first page; anonymous memory is page-aligned.
        buffer = mmap.mmap(-1, -(-(self._table.manifest.record_bytes + PAGE) // PAGE) * PAGE)
        while (job := self._jobs.get()) is not None:
            if self._closing:
                closed = RecordError(job.token, "io", "the table was closed")
                self._finished.put(Read(job.token, job.groups, 0.0, error=closed))
                continue
            with self._lock:
                self._outstanding += 1
                self.peak_outstanding = max(self.peak_outstanding, self._outstanding)
            started = time.perf_counter()
            try:
                read = self._read(job, buffer, started)
            except Exception as fault:  # noqa: BLE001 - it is raised where the read is waited for
                read = Read(job.token, job.groups, time.perf_counter() - started, fault=fault)
            with self._lock:
                self._outstanding -= 1
            self._finished.put(read)

    def _read(self, job: ReadRequest, buffer: mmap.mmap, started: float) -> Read:
        start, size = self._extent(job)
        index, offset = self._table.locate(job.token)
        offset += start
        first = offset // PAGE * PAGE
        length = -(-(offset + size) // PAGE) * PAGE - first
        payload: Bytes = np.frombuffer(buffer, np.uint8, size, offset - first)
        moved = 0
        failures: tuple[ErrorKind, ...] = ()
        while True:
            try:
                got = os.preadv(self._fds[index], [memoryview(buffer)[:length]], first)
                moved += got
                if got < offset - first + size:
                    raise RecordError(job.token, "short", "the file ends before it does")
                self._table.check(job.token, payload, job.groups)
                break
            except OSError as system_error:
                error = RecordError(job.token, "io", str(system_error))
            except RecordError as record_error:
                error = record_error
            failures += (error.kind,)
            if len(failures) == ATTEMPTS:
                return Read(job.token, job.groups, time.perf_counter() - started, moved, failures, error)
        delivered = job.deliver(payload)
        return Read(job.token, job.groups, time.perf_counter() - started, moved, failures, delivered=delivered)

    def close(self) -> None:
        """Finish the running reads, fail the queued ones, close the files. A second time does nothing."""
        self._closing = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._close_files()

    def _close_files(self) -> None:
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)
        self._fds.clear()
