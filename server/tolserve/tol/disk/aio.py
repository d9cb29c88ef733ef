"""Linux's native asynchronous I/O by its system calls: reads start at once and end without a thread of ours.

`io_submit` and `io_getevents` are what libaio wraps; ctypes lets go of the GIL around them. Measured against a pool of
threads and io_uring in benchmarks/results/disk-candidates.json: a lone record of 98,304 bytes takes 161 us from submit
to delivery against 218 us through threads, which also need the GIL before they can begin. io_uring is no faster, and
container runtimes refuse it by default while they allow this.
"""

import ctypes
import errno
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from tolserve.tol.table import Bytes

_RING_MAGIC = 0xA10A10A1
# Watch for so long before sleeping. 1, 4, 8 reads of 26 KB are then delivered after 101, 224, 400 us (median); without
# it after 122, 279, 463 (benchmarks/results/disk-candidates.json).
SPIN_SECONDS = 500e-6

# asm/unistd.h: io_setup, io_destroy, io_submit, io_getevents
_CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}


class _Iocb(ctypes.Structure):
    """linux/aio_abi.h, little-endian; operation 0 is a read."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("operation", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _syscall(number: int) -> Callable[..., int]:
    """The system call of that number with five arguments, integers or addresses; minus one for an error, in errno."""
    call = ctypes.CDLL(None, use_errno=True)["syscall"]  # another object than anybody else's: its types are ours
    call.restype = ctypes.c_long
    call.argtypes = (ctypes.c_long,) * 6
    return partial(call, number)


class ReadAt(NamedTuple):
    """A read of `bytes` at `offset` of a file into the buffer of that number."""

    buffer: int
    fd: int
    offset: int
    bytes: int


class AsyncReader:
    """Up to `depth` reads at once into `buffers`, each page-aligned and of `buffer_bytes`, a multiple of a page.

    Used by one thread. Raises OSError where the system has no such calls, refuses them (a container's filter) or has
    none left (fs.aio-max-nr).
    """

    def __init__(self, depth: int, buffers: int, buffer_bytes: int, at_once: int) -> None:
        calls = _CALLS.get(platform.machine())
        if sys.platform != "linux" or calls is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise OSError(errno.ENOSYS, "no asynchronous reads on this system")
        setup, self._destroy, self._submit, self._getevents = (_syscall(number) for number in calls)
        self._context = ctypes.c_ulong(0)
        if setup(depth, ctypes.addressof(self._context), 0, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_setup was refused")
        # linux/fs/aio.c: the context is the address of a ring that the kernel writes: id, size, head, tail, magic.
        ring = (ctypes.c_uint32 * 5).from_address(self._context.value)
        self._head, self._tail = (ctypes.c_uint32.from_address(self._context.value + at) for at in (8, 12))
        self._may_look = ring[4] == _RING_MAGIC
        # Huge pages would change nothing: submitting is as fast with small ones.
        memory: Bytes = np.frombuffer(mmap.mmap(-1, buffers * buffer_bytes), np.uint8)
        self.buffers = [memory[first : first + buffer_bytes] for first in range(0, memory.size, buffer_bytes)]
        self._iocbs = [_Iocb(data=n, address=memory.ctypes.data + n * buffer_bytes) for n in range(buffers)]
        self._addresses = [ctypes.addressof(iocb) for iocb in self._iocbs]
        self._batch = (ctypes.c_void_p * depth)()
        self.at_once = at_once
        # struct io_event: the iocb's data, its address, the result, a second result
        self._events = np.zeros((at_once, 4), np.int64)
        self._events_address = self._events.ctypes.data
        self._refused: list[tuple[int, int]] = []
        self.running = 0

    def start(self, reads: Sequence[ReadAt]) -> None:
        """Start reads, no more than `depth` with those that run. A read that cannot start is over at once."""
        for index, read in enumerate(reads):
            iocb = self._iocbs[read.buffer]
            iocb.fd, iocb.offset, iocb.bytes = read.fd, read.offset, read.bytes
            self._batch[index] = self._addresses[read.buffer]
        self.running += len(reads)
        done, batch = 0, ctypes.addressof(self._batch)
        while done < len(reads):
            count = self._submit(
                self._context.value, len(reads) - done, batch + done * ctypes.sizeof(ctypes.c_void_p), 0, 0
            )
            if count <= 0:
                self._refused.append((reads[done].buffer, -(ctypes.get_errno() or errno.EAGAIN)))
                count = 1
            done += count

    def over(self, seconds: float | None) -> list[tuple[int, int]]:
        """Reads that are over, up to `at_once` of them, as (buffer, bytes read or minus the error number); waits
        `seconds` for the first one, None without end. Empty when nothing runs."""
        over, self._refused = self._refused, []
        if over:
            seconds = 0.0
        timeout = None if seconds is None else _Timespec(int(seconds), int(seconds % 1 * 1e9))
        limit = 0 if timeout is None else ctypes.addressof(timeout)
        if seconds != 0.0 and self.running > len(over) and self._may_look:
            self._look()
        least = 0 if seconds == 0 else 1
        while self.running > len(over):
            count = self._getevents(self._context.value, least, self.at_once, self._events_address, limit)
            if count >= 0:
                over += [(buffer, got) for buffer, _, got, _ in self._events[:count].tolist()]
                break
            if ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), f"io_getevents: {os.strerror(ctypes.get_errno())}")
        self.running -= len(over)
        return over

    def _look(self) -> None:
        """Watch the kernel's ring for a while before sleeping: see SPIN_SECONDS."""
        head, tail = self._head, self._tail
        end = time.perf_counter() + SPIN_SECONDS
        while head.value == tail.value and time.perf_counter() < end:
            pass

    def close(self) -> None:
        """Give the kernel's context back. Not while reads run: it would wait for them without end."""
        if self.running:
            raise RuntimeError(f"{self.running} reads are still running")
        self._destroy(self._context.value, 0, 0, 0, 0)
