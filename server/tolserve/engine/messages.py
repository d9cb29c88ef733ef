"""Typed messages between API workers and the engine process: msgpack by msgspec, never pickle."""

from typing import Any, Literal

import msgspec

from tolserve.engine.look import Attribution, TokenView
from tolserve.engine.request import Delta, Failure, PackView, Request
from tolserve.metrics import Metric
from tolserve.tol.view import CacheSizes, DeviceView


class Submit(msgspec.Struct, tag="submit", frozen=True):
    request: Request


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """The client is gone; unknown ids are ignored, since the request may just have finished."""

    request_id: str


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A worker announces itself; answered with `Ready` once the engine can serve."""


class AskMetrics(msgspec.Struct, tag="ask_metrics", frozen=True):
    """Answered with `MetricsSnapshot`."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Facts about the served model that the API needs to check requests."""

    vocab_size: int
    num_layers: int
    max_model_len: int
    fingerprint: str | None
    encoding: str | None


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """What a step gave to the sequences of one worker."""

    deltas: list[Delta]


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    failure: Failure


class Heartbeat(msgspec.Struct, tag="heartbeat", frozen=True):
    """The engine process runs; the step that runs now has taken so long, 0 when idle. Comes on a socket of its own."""

    step_seconds: float


class MetricsSnapshot(msgspec.Struct, tag="metrics", frozen=True):
    metrics: list[Metric]


class AskCache(msgspec.Struct, tag="ask_cache", frozen=True):
    """Answered with `Cache`; at most `limit` records."""

    limit: int


class Cache(msgspec.Struct, tag="cache", frozen=True):
    """`view` is None for a model without a table."""

    view: DeviceView | None


class Resize(msgspec.Struct, tag="resize", frozen=True):
    """Answered with `Resized`. Sizes in the words of the options; None leaves a tier as it is."""

    device_cache: str | None
    host_cache: str | None


class Reopen(msgspec.Struct, tag="reopen", frozen=True):
    """Answered with `Reopened`."""


class Declined(msgspec.Struct, frozen=True):
    """Why nothing was changed, or found: "invalid" is the asker's doing, "memory" that there is none for it, "busy"
    that there is none right now, "conflict" that what lies at the table's path cannot be used, "table" that a record
    could not be read."""

    kind: Literal["invalid", "memory", "busy", "conflict", "table"]
    message: str


class Resized(msgspec.Struct, tag="resized", frozen=True):
    """One of the two is None."""

    sizes: CacheSizes | None
    declined: Declined | None


class Reopened(msgspec.Struct, tag="reopened", frozen=True):
    """One of the two is None; `facts` are table.describe's."""

    facts: dict[str, Any] | None
    declined: Declined | None


class AskToken(msgspec.Struct, tag="ask_token", frozen=True):
    """Answered with `TokenSeen`, between two steps. `layers` None asks for all; lists are `top` long."""

    token: int
    layers: list[int] | None
    top: int


class TokenSeen(msgspec.Struct, tag="token_seen", frozen=True):
    """One of the two is None."""

    view: TokenView | None
    declined: Declined | None


class AskAttribution(msgspec.Struct, tag="ask_attribution", frozen=True):
    """Answered with `Attributed`, between two steps. Of the request its prompt matters; the rest is as in
    attribution.attribute."""

    request: Request
    targets: list[int] | None
    against: int | None


class Attributed(msgspec.Struct, tag="attributed", frozen=True):
    """One of the two is None."""

    attribution: Attribution | None
    declined: Declined | None


class AskPacks(msgspec.Struct, tag="ask_packs", frozen=True):
    """Answered with `Packs`, between two steps."""


class Packs(msgspec.Struct, tag="packs", frozen=True):
    """One of the two is None."""

    packs: list[PackView] | None
    declined: Declined | None


Look = AskToken | AskAttribution | AskPacks
ToEngine = Submit | Abort | Hello | AskMetrics | AskCache | Resize | Reopen | Look
FromEngine = (
    Ready
    | Progress
    | Refusal
    | MetricsSnapshot
    | Cache
    | Packs
    | Resized
    | Reopened
    | TokenSeen
    | Attributed
    | Heartbeat
)

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises msgspec.ValidationError or DecodeError for a frame that is none of the messages."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> FromEngine:
    return _from_engine.decode(frame)
