"""The tiers of a table as one thing: made together, resized together, closed together."""

from collections.abc import Sequence
from dataclasses import dataclass

from tolserve.tol.arena import Device, DeviceArena
from tolserve.tol.counters import Counters
from tolserve.tol.disk import READ_DEPTH, DiskSource
from tolserve.tol.host import Host, HostTier
from tolserve.tol.part import make_parts, part_slots
from tolserve.tol.policy import make_policy
from tolserve.tol.policy.base import Policy
from tolserve.tol.shared import WholeTable
from tolserve.tol.slotmap import Maps, SlotMap
from tolserve.tol.table import Table


@dataclass(frozen=True)
class TierOptions:
    """What stays the same while sizes and tables change. `frequent` tokens are for policies that need them, the most
    frequent first; `head_factor` is part.part_slots'; `mapped` keeps maps on the device for steps that look records up
    there."""

    device: Device
    policy: str = "lru"
    frequent: Sequence[int] | None = None
    head_factor: float | None = None
    io: str = "direct"
    read_depth: int = READ_DEPTH
    mapped: bool = False


class Tiers:
    """Device, host and disk tier of a table, empty at first.

    A host tier of the whole vocabulary is shared with other processes (shared.WholeTable). Raises ValueError for an
    unknown policy, io, device or a size that cannot be, TableError when the table cannot be opened, MemoryError when a
    tier's memory cannot be had.
    """

    def __init__(self, table: Table, device_slots: int, host_slots: int, options: TierOptions, count: Counters) -> None:
        _check_sizes(device_slots, host_slots)
        self.table, self.options = table, options
        self.parts = make_parts(
            table.manifest,
            device_slots,
            head_factor=options.head_factor,
            policy=options.policy,
            frequent=options.frequent,
            device=options.device,
            mapped=options.mapped,
        )
        self.disk = DiskSource(table, options.io, options.read_depth)
        try:
            self.host = self._host_tier(host_slots, count)
        except BaseException:
            self.disk.close()
            raise
        part_maps = [part.map for part in self.parts if part.map is not None]
        self.maps = Maps(part_maps, self.host.map) if part_maps else None

    def _host_tier(self, slots: int, count: Counters) -> Host:
        manifest, options = self.table.manifest, self.options
        if slots >= manifest.vocab_size:
            return WholeTable(self.table, self.disk, options.device, options.mapped)
        policy = make_policy(options.policy, slots, options.frequent)
        records = SlotMap(manifest.vocab_size, options.device) if options.mapped else None
        return HostTier(slots, manifest.record_bytes, policy, count.evictions, options.device, records)

    @property
    def slots(self) -> int:
        """Records that the device tier can hold whole."""
        return min(part.slots for part in self.parts)

    @property
    def device_bytes(self) -> int:
        """Payload bytes that the device tier has room for."""
        return sum(part.slots * part.bytes for part in self.parts)

    def policies(self) -> list[Policy]:
        return [part.policy for part in self.parts] + self.host.policies()

    def resize(self, device_slots: int | None, host_slots: int | None) -> int:
        """Change sizes, None leaves a tier alone: it needs no second memory. Returns the evictions of the device tier.

        Nothing may be on its way. Raises ValueError for sizes that cannot be, MemoryError when the new memory does not
        fit beside the old; nothing is changed then.
        """
        _check_sizes(1 if device_slots is None else device_slots, 0 if host_slots is None else host_slots)
        vocab_size = self.table.manifest.vocab_size
        if host_slots is not None and host_slots >= vocab_size != self.host.slots:
            raise ValueError("the whole table in host memory is shared between processes; restart to have it")
        arenas = self._arenas(device_slots) if device_slots is not None else []
        if host_slots is not None:
            self.host.resize(min(host_slots, vocab_size))
        return sum(part.move(arena) for part, arena in zip(self.parts, arenas, strict=False))

    def _arenas(self, device_slots: int) -> list[DeviceArena]:
        sizes = part_slots(self.table.manifest, device_slots, self.options.head_factor)
        return [
            DeviceArena(slots, part.bytes, self.options.device)
            for part, (_, slots) in zip(self.parts, sizes, strict=True)
        ]

    def reopened(self, table: Table, count: Counters) -> "Tiers":
        """Tiers of as many bytes over another version of the table; one that holds all of it holds all again."""
        old, new = self.table.manifest, table.manifest
        vocab_size = new.vocab_size
        host_slots = min(self.host.slots * old.record_bytes // new.record_bytes, vocab_size - 1)
        return Tiers(
            table,
            vocab_size if self.slots == vocab_size else max(1, self.device_bytes // new.record_bytes),
            vocab_size if self.host.slots == vocab_size else host_slots,
            self.options,
            count,
        )

    def close(self) -> None:
        self.disk.close()
        self.host.close()


def _check_sizes(device_slots: int, host_slots: int) -> None:
    if device_slots < 1 or host_slots < 0:
        raise ValueError(
            f"device cache of {device_slots} and host cache of {host_slots} records: "
            "the device cache needs at least 1, the host cache at least 0"
        )
