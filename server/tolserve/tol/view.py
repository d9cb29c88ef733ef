"""A look into the tiers, for people. Plain data: it crosses the wire to the API process, which has no torch."""

from dataclasses import dataclass
from typing import Literal

# Evictions that a look at the tier shows: a large prompt's worth at a small cache, and a few KiB to send.
EVICTIONS_KEPT = 256

Tier = Literal["device", "host", "disk"]
RecordState = Literal["resident", "pinned", "arriving"]


@dataclass(frozen=True)
class Resident:
    """A record of the device tier. `uses` counts the steps that asked for it since it came in; it is "pinned" if a
    step uses it now or the last one did: steps are too short for anybody to see their pins."""

    token: int
    uses: int
    state: RecordState


@dataclass(frozen=True)
class TierSize:
    """Room for `slots` records, `bytes` without padding."""

    slots: int
    bytes: int


@dataclass(frozen=True)
class CacheSizes:
    device: TierSize
    host: TierSize


@dataclass(frozen=True)
class DeviceView:
    """What lies in the device tier: `residents` by when the policy would evict them, latest first, as many as were
    asked for; `evicted` tokens, the latest first, at most EVICTIONS_KEPT."""

    slots: int
    used: int
    residents: list[Resident]
    evicted: list[int]
