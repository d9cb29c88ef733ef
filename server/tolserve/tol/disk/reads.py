"""One read from request to outcome, and the pool of threads that reads where the kernel does not do it alone."""

import errno
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tolserve.tol.table import Bytes, ErrorKind, RecordError, Table

Deliver = Callable[[Bytes], Any]

# A record is read again once: a bus or network error is often gone by then, and a lasting fault costs one more read.
ATTEMPTS = 2
CLOSED = "the table was closed"
HANGING = "it was still being read when the table was closed"


class ReadRequest(NamedTuple):
    """Consecutive layer groups of a record, read as one range of bytes.

    `deliver(payload)` is called with the verified bytes of those groups, in the thread that calls `finished` or, for
    `background` reads, in any other; it must copy them out, since the buffer is used again. What it returns comes
    back in `Read.delivered`.
    """

    token: int
    groups: range
    deliver: Deliver
    background: bool = False  # nobody waits for it yet


class Read(NamedTuple):
    """How one request went: `error` or `fault` is set if its bytes are not where they were to be delivered."""

    token: int
    groups: range
    seconds: float  # reading, checking and delivering, without the time in the queue
    bytes: int = 0  # moved from the file, whole pages
    failures: tuple[ErrorKind, ...] = ()  # attempts that failed
    error: RecordError | None = None
    fault: Exception | None = None  # what `deliver` raised
    delivered: Any = None  # what `deliver` returned


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way: `length` bytes at `offset` of `fd`, whole pages, that cover `size` bytes from `skip` on."""

    table: Table
    request: ReadRequest
    fd: int
    offset: int
    length: int
    skip: int
    size: int
    started: float = 0.0
    moved: int = 0
    failures: tuple[ErrorKind, ...] = ()

    def settle(self, got: int, buffer: Bytes) -> Read | None:
        """Check and deliver what an attempt brought: bytes, or minus an error number. None: try again."""
        token = self.request.token
        self.moved += max(0, got)
        try:
            if got < 0:
                raise RecordError(token, "io", str(OSError(-got, os.strerror(-got))))
            if got < self.skip + self.size:
                raise RecordError(token, "short", "the file ends before it does")
            payload = buffer[self.skip : self.skip + self.size]
            self.table.check(token, payload, self.request.groups)
        except RecordError as error:
            self.failures += (error.kind,)
            if len(self.failures) == ATTEMPTS:
                return self.over(error=error)
            # Wrong bytes may lie in the page cache alone: the next attempt must come from below it.
            with suppress(OSError):
                os.posix_fadvise(self.fd, self.offset, self.length, os.POSIX_FADV_DONTNEED)
            return None
        try:
            return self.over(delivered=self.request.deliver(payload))
        except Exception as fault:  # noqa: BLE001 - it is raised where the read is waited for
            return self.over(fault=fault)

    def over(self, error: RecordError | None = None, fault: Exception | None = None, delivered: object = None) -> Read:
        seconds = time.perf_counter() - self.started if self.started else 0.0
        token, groups = self.request.token, self.request.groups
        return Read(token, groups, seconds, self.moved, self.failures, error, fault, delivered)

    def given_up(self, why: str) -> Read:
        return self.over(error=RecordError(self.request.token, "io", why))


class ReaderPool:
    """Threads that read jobs one after another, each into a page-aligned buffer of `buffer_bytes`.

    Plain queues and no futures: a cold prompt submits hundreds of reads, and a future's locks cost more than its read.
    `peak` is the most reads that ever were on their way at once.
    """

    def __init__(self, threads: int, buffer_bytes: int) -> None:
        self.peak = 0
        self._buffer_bytes = buffer_bytes
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._over: queue.SimpleQueue[Read] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._reading: dict[threading.Thread, Job] = {}  # in the kernel now
        self._settling = 0
        self._closing = False
        # Daemons: a read that hangs in the kernel must not keep the process from ending.
        self._threads = [threading.Thread(target=self._work, name="tol-read", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def over(self, block: bool) -> list[Read]:
        """The reads that are over since the last call; with `block` at least one."""
        reads = [self._over.get()] if block else []
        while not self._over.empty():
            reads.append(self._over.get())
        return reads

    def _work(self) -> None:
        memory = mmap.mmap(-1, self._buffer_bytes)
        view, buffer = memoryview(memory), np.frombuffer(memory, np.uint8)
        while (job := self._jobs.get()) is not None:
            job.started = time.perf_counter()
            read = None
            while read is None:
                if not self._begin(job):
                    read = job.given_up(CLOSED)
                    break
                try:
                    got = os.preadv(job.fd, [view[: job.length]], job.offset)
                except OSError as error:
                    got = -(error.errno or errno.EIO)
                if not self._end():
                    return
                read = job.settle(got, buffer)
                with self._changed:
                    self._settling -= 1
                    self._changed.notify_all()
            self._over.put(read)

    def _begin(self, job: Job) -> bool:
        """Take note of a read that starts; False when none may start any more."""
        with self._changed:
            if not self._closing:
                self._reading[threading.current_thread()] = job
                self.peak = max(self.peak, len(self._reading) + self._settling)
            return not self._closing

    def _end(self) -> bool:
        """Take note of a read that came back; False when `close` gave it up: then its bytes have nowhere to go."""
        with self._changed:
            if self._reading.pop(threading.current_thread(), None) is None:
                return False
            self._settling += 1
            return True

    def close(self, patience: float) -> list[Read]:
        """End the threads once their reads are over; returns those that were queued, and those that still ran after
        `patience` seconds, as failed. The others come from `over`."""
        failed = []
        with suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                failed.append(job.given_up(CLOSED))
        for _ in self._threads:
            self._jobs.put(None)
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._reading and not self._settling, patience)
            hanging, self._reading = self._reading, {}
        for thread in self._threads:
            if thread not in hanging:
                thread.join()
        return failed + [job.given_up(HANGING) for job in hanging.values()]
