"""The device tier's memory. The only file of the paging core that knows torch."""

import threading
from collections.abc import Iterable

import torch

from tolserve.tol.table import Bytes

Device = torch.device | str
Event = torch.cuda.Event

ALIGNMENT = 16  # bytes; the widest load of a CUDA thread, so that no row of a slot is cut across one


class DeviceArena:
    """`data` uint8 [slots, stride] on `device` (cpu or cuda); a slot holds `record_bytes` and some padding.

    On CUDA fills run on a stream of their own. Two orders keep them right, and neither waits on the host: a fill
    overwrites a slot only behind the `fence` of the slot's last reader, and a reader starts only behind the fill's
    event (`ready`). Raises ValueError for another kind of device.
    """

    def __init__(self, slots: int, record_bytes: int, device: Device) -> None:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"device {device} has no arena; use cpu or cuda")
        self.record_bytes = record_bytes
        stride = -(-record_bytes // ALIGNMENT) * ALIGNMENT
        self.data = torch.empty((slots, stride), dtype=torch.uint8, device=device)
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

    def write(self, slot: int, payload: Bytes, fence: Event | None) -> Event | None:
        """Copy a record uint8 [record_bytes] into a slot; `payload` may be reused on return. Any thread may call it.

        On CUDA the copy is only launched, behind `fence`; the event returned says when it is through.
        """
        if self._on_cpu:
            self._bytes[slot] = payload
            return None
        staging, last_copy = self._staging(payload.size)
        last_copy.synchronize()  # the staging buffer's previous copy; an event never recorded is complete
        staging.numpy()[:] = payload
        with torch.cuda.stream(self._stream):
            if fence is not None:
                self._stream.wait_event(fence)
            self.data[slot, : self.record_bytes].copy_(staging, non_blocking=True)
            event = Event()
            event.record(self._stream)
        self._local.staging = staging, event
        return event

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
