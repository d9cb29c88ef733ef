"""Steering: what a request changes of the rows that its tokens get. Nothing here runs for a step that nobody steers.

A layer adds `alpha * (m * row + a)` to a steered token: alpha is the request's for that layer, m and a are those of its
packs' entries for the token and layer, 1 and 0 where there are none. Packs apply one after the other: (m, a) and then
(m', a') is (m' m, m' a + a').
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolserve.engine.packs import Pack, PackStore
from tolserve.engine.request import Steering
from tolserve.model.pack import PackError


@dataclass(frozen=True, eq=False)
class Steered:
    """A request's steering as its sequence holds it. Equal keys mean equal steering, and so equal keys and values."""

    alpha: NDArray[np.float32]  # [num_layers]
    packs: tuple[Pack, ...]
    key: bytes


def steer(asked: Steering, num_layers: int, packs: PackStore | None) -> Steered:
    """Take what a request asks for. Raises PackError for packs that cannot be had, and for another number of layers."""
    if len(asked.alpha) != num_layers:
        raise PackError(f"tol.alpha: {len(asked.alpha)} numbers; this model has {num_layers} layers")
    if asked.edits and packs is None:
        raise PackError("tol.edits: this server has no packs; start it with --packs DIR")
    try:
        taken = packs.take(asked.edits) if packs is not None else ()
    except PackError as error:
        raise type(error)(f"tol.edits: {error}") from error
    told = array("d", asked.alpha).tobytes() + b"".join(pack.digest for pack in taken)
    return Steered(np.array(asked.alpha, np.float32), taken, blake2b(told, digest_size=32).digest())


@dataclass(frozen=True)
class _Addends:
    """What a pack adds to a chunk, in order of layers: to token `places[i]` of the step `factors[i]` times row
    `entries[i]`. Those of layer L are [bounds[L], bounds[L + 1])."""

    rows: Tensor
    places: Tensor
    entries: Tensor
    factors: Tensor
    bounds: list[int]


class StepSteering:
    """Of one step's tokens, some of them steered."""

    def __init__(self, chunks: Sequence[tuple[Steered | None, list[int]]], num_layers: int, device: torch.device):
        """`chunks` are each chunk's steering and tokens, in the step's order."""
        self._device, self._addends = device, list[_Addends]()
        scales = np.ones((num_layers, sum(len(tokens) for _, tokens in chunks)), np.float32)
        start = 0
        for steered, tokens in chunks:
            end = start + len(tokens)
            if steered is not None:
                self._steer(steered, np.array(tokens, np.int64), scales[:, start:end], start)
            start = end
        self._scales = torch.from_numpy(scales).to(device)  # [num_layers, T]

    def _steer(self, steered: Steered, tokens: NDArray[np.int64], scales: NDArray[np.float32], start: int) -> None:
        """From the last pack to the first: what a pack adds is scaled by the packs behind it, as the row is by all."""
        scales[:] = steered.alpha[:, np.newaxis]
        for pack in reversed(steered.packs):
            places, entries = pack.find(tokens)
            if not places.size:
                continue
            layers = pack.entries.layers[entries]
            factors = scales[layers, places]
            scales[layers, places] *= pack.entries.scales[entries]
            used = np.flatnonzero(pack.adds[entries] & (factors != 0))
            if not used.size:
                continue
            used = used[np.argsort(layers[used], kind="stable")]
            bounds = np.searchsorted(layers[used], np.arange(len(scales) + 1)).tolist()
            at, which, times = (
                torch.from_numpy(each).to(self._device) for each in (start + places[used], entries[used], factors[used])
            )
            self._addends.append(_Addends(pack.rows, at, which, times, bounds))

    def apply(self, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(stream [T, d] with what packs add at a layer, what the rows that follow are to be scaled by [T] float32)."""
        for addends in self._addends:
            part = slice(addends.bounds[layer], addends.bounds[layer + 1])
            if part.start < part.stop:
                rows = addends.rows.index_select(0, addends.entries[part]).float()
                rows *= addends.factors[part].unsqueeze(1)
                stream = stream.index_add(0, addends.places[part], rows.to(stream.dtype))
        return stream, self._scales[layer]
