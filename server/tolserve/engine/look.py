"""What a look into the memory finds, for people. Plain data: it crosses the wire to the API process, which has no
torch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from tolserve.tol.view import Tier

# Somebody looking into the memory, or for packs, waits as long as a long step may take, then is told to try again.
LOOK_TIMEOUT_SECONDS = 10.0
# Decimals of what is said about a logit: 32-bit floats of a logit's size have no more.
DIGITS = 6


class LookError(ValueError):
    """A look that cannot be: the message says what could be asked instead."""


class Scored(NamedTuple):
    """A token, and a value that the field it stands in explains."""

    token: int
    value: float


@dataclass(frozen=True)
class Frequency:
    """Of a token in a list of counts: `share` of all that was counted; `rank` 1 is the most frequent."""

    count: int
    share: float
    rank: int


@dataclass(frozen=True)
class RowView:
    """One layer's row of a token.

    `promotes` and `suppresses` have the largest and the smallest products of the output head with row * final norm's
    weight: what the row adds to a logit where the stream's root mean square is 1. `nearest` are other tokens by the
    cosine between their rows of this layer and this one; `median_norm` is theirs. Both are missing where nothing was
    compared.
    """

    layer: int
    norm: float  # Euclidean
    median_norm: float | None
    promotes: list[Scored]
    suppresses: list[Scored]
    nearest: list[Scored]


@dataclass(frozen=True)
class TokenView:
    """A token's record. `tier` is the nearest one that held it, None where no server runs; `compared` is the number of
    other records among which the nearest were looked for; `layers` those that were asked for and have a row."""

    token: int
    tier: Tier | None
    frequency: Frequency | None
    compared: int
    layers: list[RowView]


@dataclass(frozen=True)
class Attribution:
    """What each addend of the stream adds to a logit, at each of T positions, in a model of N layers.

    The final norm's divisor is held at what it was, so that all of it is a sum: `embedding` + the N of `attention` +
    those of `memory` and `compute` is the logit of the position's target, less that of `against` if there is one. It
    holds within the rounding of the final norm's output, which is in the server's `--dtype`. `memory` is None for a
    base model, which has none, `compute` for a memory model.
    """

    targets: list[int]
    logits: list[float]  # [T]; the differences, if there is an `against`
    embedding: list[float]  # [T]
    attention: list[list[float]]  # [T, N]
    memory: list[list[float]] | None
    compute: list[list[float]] | None


def to_json(view: TokenView, label: Callable[[int], str]) -> dict[str, Any]:
    """What `tolserve inspect --json` and the server answer; `label` names a token."""

    def listed(scored: list[Scored], value: str) -> list[dict[str, Any]]:
        return [{"id": each.token, "text": label(each.token), value: round(each.value, DIGITS)} for each in scored]

    return {
        "object": "memory.token",
        "token": {"id": view.token, "text": label(view.token)},
        "tier": view.tier,
        "frequency": asdict(view.frequency) if view.frequency is not None else None,
        "compared": view.compared,
        "layers": [
            {
                "layer": row.layer,
                "norm": row.norm,
                "median_norm": row.median_norm,
                "promotes": listed(row.promotes, "value"),
                "suppresses": listed(row.suppresses, "value"),
                "nearest": listed(row.nearest, "cosine"),
            }
            for row in view.layers
        ],
    }


def render(view: TokenView, label: Callable[[int], str]) -> str:
    """The same for a terminal."""

    def listed(scored: list[Scored]) -> str:
        return "  ".join(f"{label(each.token)!r} {each.value:.2f}" for each in scored)

    lines = [f"token {view.token} {label(view.token)!r}"]
    if (often := view.frequency) is not None:
        lines.append(f"frequency: {often.count:,} times, {often.share:.3%} of all, rank {often.rank:,}")
    for row in view.layers:
        beside = f" (median {row.median_norm:.2f})" if row.median_norm is not None else ""
        lines += ["", f"layer {row.layer}: norm {row.norm:.2f}{beside}"]
        lines += [f"  promotes    {listed(row.promotes)}", f"  suppresses  {listed(row.suppresses)}"]
        if row.nearest:
            lines.append(f"  nearest     {listed(row.nearest)}")
    return "\n".join(lines)
