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
from collections.abc import Callable
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
class Read:
    """How the reading of one record went: `error` or `fault` is set if it is not where it was to be delivered."""

    token: int
    seconds: float  # reading, checking and delivering, without the time in the queue
    bytes: int = 0  # moved from the file, whole pages
    failures: tuple[ErrorKind, ...] = ()  # attempts that failed
    error: RecordError | None = None
    fault: Exception | None = None  # what `deliver` raised
    delivered: Any = None  # what `deliver` returned


class DiskSource:
    """Reads records of a table, up to `depth` at the same time. Every `submit` leads to one `Read` from `finished`.

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
        self._jobs: queue.SimpleQueue[tuple[int, Deliver] | None] = queue.SimpleQueue()
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

    def submit(self, token: int, deliver: Deliver) -> None:
        """Start reading a record. `deliver(payload)` is called in a reader thread once the bytes are verified; it
        must copy them out, since the buffer is used again."""
        self._jobs.put((token, deliver))

    def finished(self, block: bool) -> Read | None:
        """A read that is through, in the order of their ends; None if there is none yet and `block` is False.

        Blocks for ever when nothing was submitted.
        """
        try:
            return self._finished.get(block)
        except queue.Empty:
            return None

    def _work(self) -> None:
        # Covering pages of a record, which may start anywhere in its first page; anonymous memory is page-aligned.
        buffer = mmap.mmap(-1, -(-(self._table.manifest.record_bytes + PAGE) // PAGE) * PAGE)
        while (job := self._jobs.get()) is not None:
            token, deliver = job
            if self._closing:
                self._finished.put(Read(token, 0.0, error=RecordError(token, "io", "the table was closed")))
                continue
            with self._lock:
                self._outstanding += 1
                self.peak_outstanding = max(self.peak_outstanding, self._outstanding)
            started = time.perf_counter()
            try:
                read = self._read(token, deliver, buffer, started)
            except Exception as fault:  # noqa: BLE001 - it is raised where the read is waited for
                read = Read(token, time.perf_counter() - started, fault=fault)
            with self._lock:
                self._outstanding -= 1
            self._finished.put(read)

    def _read(self, token: int, deliver: Deliver, buffer: mmap.mmap, started: float) -> Read:
        record_bytes = self._table.manifest.record_bytes
        index, offset = self._table.locate(token)
        first = offset // PAGE * PAGE
        length = -(-(offset + record_bytes) // PAGE) * PAGE - first
        payload: Bytes = np.frombuffer(buffer, np.uint8, record_bytes, offset - first)
        moved = 0
        failures: tuple[ErrorKind, ...] = ()
        while True:
            try:
                got = os.preadv(self._fds[index], [memoryview(buffer)[:length]], first)
                moved += got
                if got < offset - first + record_bytes:
                    raise RecordError(token, "short", "the file ends before it does")
                self._table.check(token, payload)
                break
            except OSError as system_error:
                error = RecordError(token, "io", str(system_error))
            except RecordError as record_error:
                error = record_error
            failures += (error.kind,)
            if len(failures) == ATTEMPTS:
                return Read(token, time.perf_counter() - started, moved, failures, error)
        delivered = deliver(payload)
        return Read(token, time.perf_counter() - started, moved, failures, delivered=delivered)

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
