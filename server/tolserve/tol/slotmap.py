"""What steps see that look their records up on the device: where each token's record lies, in arena or host memory.

The host collects changes and makes them between two launches, so a step sees what was there when it was launched. The
host keeps what the device sees beside it (`seen`): once it knows a step's tokens, it knows which rows the step read.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from tolserve.tol.arena import Device, DeviceMap, Event


class SlotMap:
    """Places of `size` tokens' records in one tier, -1 for nowhere."""

    def __init__(self, size: int, device: Device) -> None:
        self.on_device = DeviceMap(size, device)
        self.seen = np.full(size, -1, np.int32)  # by the steps that are launched from now on
        self._gone: set[int] = set()
        self._come: dict[int, tuple[int, Event | None]] = {}  # place, and the fill that still copies

    def put(self, token: int, place: int, event: Event | None) -> None:
        """A record lies here, or will once `event` is through."""
        self._come[token] = place, event

    def remove(self, token: int) -> None:
        """A record is here no longer. Its place may be overwritten behind all steps launched before the next
        `publish`."""
        self._come.pop(token, None)
        if self.seen[token] >= 0:
            self._gone.add(token)

    def publish(self, wait: bool) -> None:
        """Let the steps that are launched from now on see what has changed.

        A record whose copy still runs is left for the next time; with `wait` the current stream waits for the copy
        instead. What is gone is never left.
        """
        if not self._gone and not self._come:
            return
        changes = dict.fromkeys(self._gone, -1)
        events = []
        for token, (place, event) in list(self._come.items()):
            if event is not None and not event.query():
                if not wait:
                    continue
                events.append(event)
            changes[token] = place
            del self._come[token]
        self._gone.clear()
        self.on_device.ready(events)
        self._write(changes)

    def _write(self, changes: Mapping[int, int]) -> None:
        if changes:
            tokens, places = list(changes), list(changes.values())
            self.seen[tokens] = places
            self.on_device.write(tokens, places)

    def reset(self, places: Mapping[int, int]) -> None:
        """Forget everything; these records lie here. No step may be on its way."""
        self._gone.clear()
        self._come.clear()
        self._write(dict.fromkeys(np.flatnonzero(self.seen >= 0).tolist(), -1) | dict(places))


class Maps:
    """The maps of a device tier's parts, and of the host tier where its records can be read in place."""

    def __init__(self, parts: Iterable[SlotMap], host: SlotMap | None) -> None:
        self.parts, self.host = list(parts), host
        self.blind = False  # a step was launched whose tokens the host does not know

    def publish(self, wait: bool = False) -> None:
        for each in (*self.parts, self.host):
            if each is not None:
                each.publish(wait)

    def reach(self, token: int) -> bool:
        """Whether a step launched now finds the record, whole."""
        return self._in_host(token) or all(part.seen[token] >= 0 for part in self.parts)

    def in_place(self, token: int) -> bool:
        """Whether such a step reads the record, or a part of it, in host memory."""
        return self._in_host(token) and any(part.seen[token] < 0 for part in self.parts)

    def _in_host(self, token: int) -> bool:
        return self.host is not None and self.host.seen[token] >= 0
