"""A whole table in host memory: immutable, and shared by all server processes of one user on one host.

It lies in a file under /dev/shm, which is RAM with a name. The first process that asks for it reads the table into it,
the others map the same pages. Each holds a shared lock on the file; who lets go last deletes it. What a killed process
left behind is used by the next one that wants the same records, and deleted by the next one that does not.
"""

import fcntl
import hashlib
import logging
import mmap
import os
import time
from itertools import islice
from pathlib import Path

from tolserve.tol.arena import Device, Event, HostMemory
from tolserve.tol.disk import DiskSource, ReadRequest
from tolserve.tol.policy.base import Policy
from tolserve.tol.slotmap import SlotMap
from tolserve.tol.table import Bytes, RecordError, Table

log = logging.getLogger(__name__)

_FOLDER = Path("/dev/shm")  # noqa: S108 - not a place for temporary files: RAM that processes share
_PREFIX = "tolserve-"
# Before looking again at a file that another process may be loading.
_RETRY_SECONDS = 0.05
# Reads queued while the table is loaded: the readers never idle, and the results stay few.
_QUEUE = 64


class WholeTable:
    """A host tier (host.Host) of all records. Every record was verified when it was read.

    Raises MemoryError, saying what to do, when shared memory has no room; RecordError for a record that cannot be
    read: a whole table with a hole is none.
    """

    def __init__(self, table: Table, disk: DiskSource, device: Device, mapped: bool = False) -> None:
        manifest = table.manifest
        self.slots = self.used = manifest.vocab_size
        self.reserved = 0
        self.path = _FOLDER / f"{_PREFIX}{os.getuid()}-{_identity(table)}"
        self._size = manifest.vocab_size * manifest.record_bytes
        _delete_unused(keep=self.path)
        self._fd = self._open(table, disk)
        try:
            self.map = SlotMap(self.slots, device) if mapped else None
            if self.map is not None:
                self.map.reset({token: token for token in range(self.slots)})
            mapping = mmap.mmap(self._fd, self._size, prot=mmap.PROT_READ)
            self.memory = HostMemory(manifest.vocab_size, manifest.record_bytes, device, mapping)
        except BaseException:
            self._let_go()
            raise

    def _open(self, table: Table, disk: DiskSource) -> int:
        """A descriptor of the complete file, with a shared lock on it."""
        while True:
            fd = os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH)  # waits for a process that is loading it
                mine = not self._is_complete(fd) and self._is_ours_to_load(fd)  # if it fails, no lock is left
                if mine:
                    self._load(table, disk)
                fcntl.flock(fd, fcntl.LOCK_SH)
                if _lies_at(fd, self.path) and self._is_complete(fd):  # else it was deleted, or another one loads it
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            time.sleep(_RETRY_SECONDS)

    def _is_complete(self, fd: int) -> bool:
        """Raises MemoryError for a file that somebody else put there: nothing in it could be believed."""
        status = os.fstat(fd)
        if status.st_uid != os.getuid():
            raise MemoryError(f"{self.path} belongs to another user; delete it, or give a smaller --host-cache")
        return not status.st_mode & 0o200 and status.st_size == self._size

    def _is_ours_to_load(self, fd: int) -> bool:
        """Whether no other process has the incomplete file open; it is locked against all others then."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return _lies_at(fd, self.path) and not self._is_complete(fd)

    def _load(self, table: Table, disk: DiskSource) -> None:
        """Fill the file. Its owner loses the right to write as the last act: that is what says it is complete."""
        log.info("reading the whole table into %s, %d bytes", self.path, self._size)
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, self._size)  # writing past what there is would be a signal, not an error
            records = HostMemory(self.slots, table.manifest.record_bytes, "cpu", mmap.mmap(fd, self._size)).records
            _read_all(table, disk, records)
            os.fchmod(fd, 0o400)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise MemoryError(
                f"the whole table takes {self._size} bytes of shared memory, which {_FOLDER} does not have "
                f"({error.strerror}); raise its size (docker run --shm-size, compose's shm_size, an emptyDir of medium "
                "Memory there), or give a smaller --host-cache"
            ) from error
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def __contains__(self, token: int) -> bool:
        return True

    def peek(self, token: int) -> Bytes:
        return self.memory.records[token]

    def lend(self, token: int) -> Bytes:
        return self.memory.records[token]

    def give_back(self, token: int, copy: Event | None) -> None:
        pass

    def reserve(self, token: int) -> Bytes | None:
        return None

    def settle(self, token: int, arrived: bool) -> None:
        pass

    def policies(self) -> list[Policy]:
        return []

    def resize(self, slots: int) -> None:
        if slots != self.slots:
            raise ValueError("a whole table in host memory is shared and has one size; restart for a smaller cache")

    def check(self) -> None:
        if not _lies_at(self._fd, self.path):
            raise RuntimeError(f"host tier: {self.path} was deleted")

    def close(self) -> None:
        """Let go of it; the last one deletes it. A second time does nothing."""
        if self._fd < 0:
            return
        self.memory.close()
        self._let_go()

    def _let_go(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # closing is not enough: the mapping has a copy of the descriptor
        os.close(self._fd)
        self._fd = -1
        _delete_unused(keep=None)


def _identity(table: Table) -> str:
    """The same for tables of the same records, another for any other."""
    digest = hashlib.sha256(table.manifest.to_json().encode())
    digest.update(table.checksums.tobytes())
    return digest.hexdigest()[:32]


def _lies_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _delete_unused(keep: Path | None) -> None:
    """Delete this user's tables that no process holds."""
    for path in _FOLDER.glob(f"{_PREFIX}{os.getuid()}-*"):
        if path == keep:
            continue
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # gone, or somebody else's under this name
            continue
        try:
            if os.fstat(fd).st_uid == os.getuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except OSError:
            pass  # somebody uses or loads it, or it is not ours
        finally:
            os.close(fd)


def _read_all(table: Table, disk: DiskSource, records: Bytes) -> None:
    """Read every record into records uint8 [vocab_size, record_bytes]. Raises RecordError for the first bad one."""
    groups = range(len(table.manifest.groups))

    def request(token: int) -> ReadRequest:
        def deliver(payload: Bytes) -> None:
            records[token] = payload

        return ReadRequest(token, groups, deliver)

    coming = iter(range(table.manifest.vocab_size))
    disk.submit([request(token) for token in islice(coming, _QUEUE)])
    left = table.manifest.vocab_size
    failed: RecordError | Exception | None = None
    while left:
        for read in disk.finished(block=True):
            left -= 1
            failed = failed or read.error or read.fault
            if (token := next(coming, None)) is not None:
                disk.submit([request(token)])
    if failed is not None:
        raise failed
