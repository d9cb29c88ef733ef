"""A file system that shows a folder and breaks on demand, through FUSE: real system calls meet real faults, whatever
makes them (preadv, native AIO, io_uring, mmap).

    python tests/faulty_fs.py FOLDER MOUNTPOINT SOCKET WAY

It runs as a process of its own. `Mount` starts and stops one, switches faults on and off through the socket, and asks
how often each of them was really injected.
"""

import errno
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

MOUNT_SECONDS = 30.0

# How it treats reads: each one comes here, opened with O_DIRECT or not ("uncached"); the same, but O_DIRECT is refused
# ("refuses direct"); the kernel keeps pages of files that are not opened with O_DIRECT ("page cache").
Way = Literal["uncached", "refuses direct", "page cache"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with operations `op` on bytes [first, last) of files whose name ends in `file`.

    `error` fails with `code`, after half of the bytes if it is a write; `short` reads half; `corrupt` flips a bit of
    every byte in range; `delay` waits `seconds`, or until the fault is cleared. The first `after` operations pass, the
    next `times` are hit, all of them for None.
    """

    op: Literal["open", "read", "write", "fsync", "rename"]
    kind: Literal["error", "short", "corrupt", "delay"]
    file: str = ""
    first: int = 0
    last: int = 1 << 62
    after: int = 0
    times: int | None = None
    code: int = errno.EIO
    seconds: float = 0.0


class Faults:
    """The faults that are switched on, in the file system's process; used by all of its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: dict[int, Fault] = {}
        self._seen: dict[int, int] = {}
        self._fired: dict[int, int] = {}
        self._cleared: dict[int, threading.Event] = {}

    def add(self, fault: Fault) -> int:
        with self._lock:
            number = len(self._seen)
            self._on[number] = fault
            self._seen[number] = self._fired[number] = 0
            self._cleared[number] = threading.Event()
            return number

    def fired(self, number: int) -> int:
        with self._lock:
            return self._fired[number]

    def clear(self) -> None:
        with self._lock:
            for number in self._on:
                self._cleared[number].set()
            self._on.clear()

    def _hit(self, op: str, path: str, first: int, last: int) -> list[tuple[int, Fault]]:
        hits = []
        with self._lock:
            for number, fault in self._on.items():
                if fault.op != op or not path.endswith(fault.file) or last <= fault.first or first >= fault.last:
                    continue
                self._seen[number] += 1
                spent = fault.times is not None and self._fired[number] >= fault.times
                if self._seen[number] > fault.after and not spent:
                    self._fired[number] += 1
                    hits.append((number, fault))
        return hits

    def meet(self, op: str, path: str, first: int = 0, last: int = 1 << 62) -> list[Fault]:
        """Count and suffer what waits for this operation; what changes the bytes is returned. Raises OSError."""
        hits = self._hit(op, path, first, last)
        for number, fault in hits:
            if fault.kind == "delay":
                self._cleared[number].wait(fault.seconds)
        for _, fault in hits:
            if fault.kind == "error":
                raise OSError(fault.code, os.strerror(fault.code))
        return [fault for _, fault in hits if fault.kind in ("short", "corrupt")]


def damaged(data: bytes, offset: int, faults: list[Fault]) -> bytes:
    for fault in faults:
        if fault.kind == "short":
            data = data[: len(data) // 2]
        else:
            begin, end = max(fault.first - offset, 0), min(fault.last - offset, len(data))
            data = data[:begin] + bytes(byte ^ 1 for byte in data[begin:end]) + data[end:]
    return data


class PassThrough:
    """FUSE's operations, each done on the folder behind. Whatever is left out answers "not implemented"."""

    use_ns = True

    def __init__(self, folder: str, faults: Faults, allow_direct: bool) -> None:
        self.folder, self.faults, self.allow_direct = folder, faults, allow_direct

    def _behind(self, path: str) -> str:
        return self.folder + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.lstat(self._behind(path)) if fh is None else os.fstat(fh)
        names = ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {name: getattr(found, name + "_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._behind(path))]

    def open(self, path: str, flags: int) -> int:
        self.faults.meet("open", path)
        if flags & os.O_DIRECT and not self.allow_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        # Our own buffers are not aligned, and what is read here has been written here.
        return os.open(self._behind(path), flags & ~os.O_DIRECT)

    def create(self, path: str, mode: int, flags: int) -> int:
        self.faults.meet("open", path)
        return os.open(self._behind(path), flags & ~os.O_DIRECT | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        faults = self.faults.meet("read", path, offset, offset + size)
        return damaged(os.pread(fh, size, offset), offset, faults)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        try:
            self.faults.meet("write", path, offset, offset + len(data))
        except OSError:
            os.pwrite(fh, data[: len(data) // 2], offset)
            raise
        return os.pwrite(fh, data, offset)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self.faults.meet("fsync", path)
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self.faults.meet("fsync", path)
        return 0

    def flush(self, path: str, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._behind(path) if fh is None else fh, length)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        if mode:
            raise OSError(errno.EOPNOTSUPP, "only plain allocation")
        self.faults.meet("write", path, offset, offset + size)
        os.posix_fallocate(fh, offset, size)
        return 0

    def rename(self, old: str, new: str) -> int:
        self.faults.meet("rename", new)
        os.rename(self._behind(old), self._behind(new))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._behind(path))
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._behind(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._behind(path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._behind(path), mode)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._behind(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}


def serve_control(path: str, faults: Faults) -> None:
    """Answer one JSON line for each: {"add": fault} its number, {"fired": number} a count, {"clear": true} null."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked = json.loads(self.rfile.readline())
            answer: int | None = None
            if "add" in asked:
                answer = faults.add(Fault(**asked["add"]))
            elif "fired" in asked:
                answer = faults.fired(asked["fired"])
            else:
                faults.clear()
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    server = socketserver.ThreadingUnixStreamServer(path, Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()


def unmount(path: Path | str) -> None:
    """Also where files are open, and where its process is gone already."""
    subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False, capture_output=True)


class Mount:
    """The file system in a process of its own: `folder`, seen at `path`. Raises RuntimeError if it cannot mount."""

    def __init__(self, folder: Path, path: Path, socket_path: Path, way: Way = "uncached") -> None:
        path.mkdir()
        self.folder, self.path, self._socket = folder, path, socket_path
        argv = [sys.executable, __file__, str(folder), str(path), str(socket_path), way]
        # It unmounts itself and ends when its standard input closes, however this process ends.
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + MOUNT_SECONDS
        while not os.path.ismount(path):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"the faulty file system did not come up: {self.process.communicate()[1]}")
            time.sleep(0.01)

    def at(self, path: Path) -> Path:
        """Where a path below `folder` is seen."""
        return self.path / path.relative_to(self.folder)

    def _ask(self, **question: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.connect(str(self._socket))
            channel.sendall(json.dumps(question).encode() + b"\n")
            return json.loads(channel.makefile().readline())

    def inject(self, fault: Fault) -> "Injected":
        """Switch a fault on, beside those that are on."""
        return Injected(self, self._ask(add=asdict(fault)))

    def fired(self, number: int) -> int:
        count: int = self._ask(fired=number)
        return count

    def clear(self) -> None:
        """Switch all faults off; delays that run end now. Does nothing after `die`."""
        if self.process.poll() is None:
            self._ask(clear=True)

    def die(self) -> None:
        """Kill the file system's process: from now on every call on an open file is ENOTCONN."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.clear()
        self.process.communicate(timeout=MOUNT_SECONDS)
        unmount(self.path)  # which one that was killed could not do itself


MountOver = Callable[..., Mount]  # (folder, way): what the fixture `mount_over` gives


@dataclass(frozen=True)
class Injected:
    """A fault that was switched on in a mount."""

    mount: Mount
    number: int

    @property
    def fired(self) -> int:
        """How often it was really injected."""
        return self.mount.fired(self.number)

    def wait(self, times: int = 1, seconds: float = 60.0) -> None:
        """Until it was injected so often."""
        deadline = time.monotonic() + seconds
        while self.fired < times:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the fault fired {self.fired} times, not {times}")
            time.sleep(0.01)


def end_with_parent(path: str) -> None:
    """Wait for standard input to be closed; a file that is still open somewhere does not hold this process up."""
    sys.stdin.read()
    unmount(path)
    os._exit(0)


def main() -> None:
    from mfusepy import FUSE

    folder, path, control, way = sys.argv[1:]
    faults = Faults()
    serve_control(control, faults)
    threading.Thread(target=end_with_parent, args=(path,), daemon=True).start()
    operations = PassThrough(folder, faults, allow_direct=way != "refuses direct")
    options = {"direct_io": way != "page cache", "attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    FUSE(operations, path, foreground=True, hard_remove=True, use_ino=True, **options)


if __name__ == "__main__":
    main()
