"""The device tier's memory. The only file of the paging core that knows torch."""

import mmap
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from tolserve.tol.table import Bytes

Device = torch.device | str
Event = torch.cuda.Event

_REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly
ALIGNMENT = 16  # bytes; the widest load of a CUDA thread, so that no row of a slot is cut across one


class DeviceArena:
    """`data` uint8 [slots, stride] on `device` (cpu or cuda); a slot holds `record_bytes` and some padding.

    On CUDA fills run on a stream of their own. Two orders keep them right, and neither waits on the host: a fill
    overwrites a slot only behind the `fence` of the slot's last reader, and a reader starts only behind the fill's
    event (`ready`). Raises ValueError for another kind of device, MemoryError when the device has no room.
    """

    def __init__(self, slots: int, record_bytes: int, device: Device) -> None:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"device {device} has no arena; use cpu or cuda")
        self.slots, self.record_bytes = slots, record_bytes
        stride = -(-record_bytes // ALIGNMENT) * ALIGNMENT
        try:
            self.data = torch.empty((slots, stride), dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch's own for CUDA is a subclass; for the CPU there is none
            raise MemoryError(f"{slots} records of {stride} bytes do not fit on {device}: {error}") from error
        self.data[0].zero_()  # read for a record that is nowhere; the result is thrown away, but must be no NaN
        self.device = self.data.device
        self._on_cpu = self.device.type == "cpu"
        if self._on_cpu:
            self._bytes: Bytes = self.data.numpy()[:, :record_bytes]
        else:
            self._stream = torch.cuda.Stream(self.device)
            self._local = threading.local()

    def fence(self) -> Event | None:
        """A mark behind all that the calling thread has launched on its current stream."""
        if self._on_cpu:
            return None
        event = Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def write(self, slot: int, payload: Bytes, fence: Event | None, stays: bool = False) -> Event | None:
        """Copy a record uint8 [record_bytes] into a slot. Any thread may call it.

        On CUDA the copy is only launched, behind `fence`; the event returned says when it is through. `payload` may be
        reused on return, unless it `stays`: then it lies in HostMemory, is copied from where it lies, and must not
        change before the event.
        """
        if self._on_cpu:
            self._bytes[slot] = payload
            return None
        if stays:
            return self._launch(slot, torch.from_numpy(payload), fence)
        staging, last_copy = self._staging(payload.size)
        last_copy.synchronize()  # the staging buffer's previous copy; an event never recorded is complete
        staging.numpy()[:] = payload
        event = self._launch(slot, staging, fence)
        self._local.staging = staging, event
        return event

    def read(self, slot: int) -> Bytes:
        """A copy of a slot's record uint8 [record_bytes] in RAM, behind what the current stream was given."""
        found: Bytes = self.data[slot, : self.record_bytes].cpu().numpy().copy()
        return found

    def _launch(self, slot: int, source: torch.Tensor, fence: Event | None) -> Event:
        """Copy pinned memory into a slot on the fill stream, behind `fence`."""
        with torch.cuda.stream(self._stream):
            if fence is not None:
                self._stream.wait_event(fence)
            self.data[slot, : self.record_bytes].copy_(source, non_blocking=True)
            event = Event()
            event.record(self._stream)
        return event

    def copy(self, other: "DeviceArena", slots: Sequence[int]) -> None:
        """Take these slots of another arena of the same device and record size over, into the slots from 0 on.

        Both arenas must be `quiet`. Needs no memory but for the slots' numbers.
        """
        index = torch.tensor(slots, dtype=torch.int64, device=self.device)
        torch.index_select(other.data, 0, index, out=self.data[: len(slots)])
        self.quiet()

    def quiet(self) -> None:
        """Wait until all work on the device is done: what was launched on any stream."""
        if not self._on_cpu:
            torch.cuda.synchronize(self.device)

    def _staging(self, size: int) -> tuple[torch.Tensor, Event]:
        """The calling thread's pinned buffer uint8 [size] and the event of the last copy out of it."""
        if not hasattr(self._local, "staging"):
            self._local.staging = torch.empty(size, dtype=torch.uint8, pin_memory=True), Event()
        staging: tuple[torch.Tensor, Event] = self._local.staging
        return staging

    def ready(self, events: Iterable[Event]) -> None:
        """Make the calling thread's current stream wait for these fills."""
        for event in events:
            torch.cuda.current_stream(self.device).wait_event(event)


class DeviceMap:
    """`data` int32 [size] on `device`: where each token's record lies, -1 for nowhere. Steps look it up themselves.

    Raises MemoryError when the device has no room.
    """

    def __init__(self, size: int, device: Device) -> None:
        try:
            self.data = torch.full((size,), -1, dtype=torch.int32, device=device)
        except RuntimeError as error:  # torch's own for CUDA is a subclass; for the CPU there is none
            raise MemoryError(f"the places of {size} records do not fit on {device}: {error}") from error

    def write(self, tokens: Sequence[int], places: Sequence[int]) -> None:
        """Launch the change of these entries on the current stream: steps launched from now on see it, earlier ones do
        not. The host does not wait."""
        on_device = self.data.is_cuda
        # Pinned memory of torch's cache: it is not handed out again before the copy is through.
        changes = torch.tensor([tokens, places], dtype=torch.int64, pin_memory=on_device)
        there = changes.to(self.data.device, non_blocking=True)
        self.data.index_copy_(0, there[0], there[1].int())

    def ready(self, events: Iterable[Event]) -> None:
        """Make the current stream wait for these fills."""
        for event in events:
            torch.cuda.current_stream(self.data.device).wait_event(event)


class HostMemory:
    """`records` uint8 [slots, record_bytes] in RAM: anonymous pages, or those of a `file` mapping, which is only read.

    For a CUDA device it is pinned by registering exactly these bytes: torch's own pinned allocations are rounded up to
    a power of two, 95 GB to 128. Pages of the CPU's are taken from the system when first written. Raises MemoryError
    when it cannot be had.
    """

    def __init__(self, slots: int, record_bytes: int, device: Device, file: mmap.mmap | None = None) -> None:
        size = slots * record_bytes
        try:
            buffer = file if file is not None else mmap.mmap(-1, max(size, 1))
        except OSError as error:
            raise MemoryError(f"{slots} records of {record_bytes} bytes do not fit in host memory: {error}") from error
        self.records: Bytes = np.frombuffer(buffer, np.uint8, size).reshape(slots, record_bytes)
        self._registered = torch.device(device).type == "cuda" and size > 0
        if self._registered:
            flags = 0 if file is None else _REGISTER_READ_ONLY
            code = torch.cuda.cudart().cudaHostRegister(self.records.ctypes.data, size, flags)
            if int(code) != 0:
                self._registered = False
                with suppress(RuntimeError):  # the refusal stays CUDA's last error until somebody asks for it
                    torch.zeros(1, device=device)
                raise MemoryError(f"{size} bytes of host memory cannot be pinned: CUDA error {int(code)}")

    def tensor(self) -> Tensor:
        """`records` as kernels take it, without a copy; read-only where the file is."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.records)

    def close(self) -> None:
        """Unpin; the memory itself goes with the last array that refers to it."""
        if self._registered:
            torch.cuda.cudart().cudaHostUnregister(self.records.ctypes.data)
            self._registered = False
