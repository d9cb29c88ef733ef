"""The device tier's memory. The only file of the paging core that knows torch."""

import threading
from collections.abc import Iterable

import torch

from tolserve.tol.table import Bytes

Device = torch.device | str
Event = torch.cuda.Event


class DeviceArena:
    """`rows` bf16 [slots, layers, hidden_size] on `device` (cpu or cuda); a slot holds one record.

    On CUDA fills run on a stream of their own. Two orders keep them right, and neither waits on the host: a fill
    overwrites a slot only behind the `fence` of the slot's last reader, and a reader starts only behind the fill's
    event (`ready`). Raises ValueError for another kind of device.
    """

    def __init__(self, slots: int, layers: int, hidden_size: int, device: Device) -> None:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"device {device} has no arena; use cpu or cuda")
        self.rows = torch.empty((slots, layers, hidden_size), dtype=torch.bfloat16, device=device)
        self.device = self.rows.device
        self._on_cpu = self.device.type == "cpu"
        if self._on_cpu:
            self._bytes: Bytes = self.rows.view(torch.uint8).reshape(slots, -1).numpy()
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
            self.rows[slot].view(torch.uint8).view(-1).copy_(staging, non_blocking=True)
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
