"""Low-rank tables: the directions that a layer's rows over the whole vocabulary are made of."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tolserve.model.networks import MemoryNetworks
from tolserve.tol.encoding import EncodingError
from tolserve.tol.factors import Factors


@dataclass(frozen=True)
class RankChoice:
    """One `rank` for every layer, or for each layer the least that keeps `energy`, a share of the squared norm.

    Ranks are rounded up to whole multiples of `step`, as far as the width allows.
    """

    rank: int | None
    energy: float | None
    step: int

    def describe(self, layers: tuple[int, ...]) -> str:
        return f"rank={self.rank} energy={self.energy} step={self.step} layers={','.join(map(str, layers))}"

    def of(self, eigenvalues: Tensor) -> int:
        """Rank for these eigenvalues float64 [d] of a layer's Gram matrix, largest first. Raises EncodingError."""
        width = len(eigenvalues)
        if self.rank is not None and self.rank > width:
            raise EncodingError(f"--rank {self.rank}: the model's rows have {width} values")
        if self.energy is not None:
            shares = eigenvalues.clamp(min=0).cumsum(0)
            rank = int((shares < self.energy * shares[-1]).sum()) + 1
        else:
            rank = self.rank or width
        return max(self.step, min(-(-rank // self.step) * self.step, width // self.step * self.step))


def main_directions(batches: Iterable[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """Of rows [n, width], given in batches: squared singular values [width], largest first, and the right singular
    vectors that belong to them, as rows [width, width]; both float64.

    From the Gram matrix, which needs width^2 values of memory instead of all rows. Squaring halves the digits, which
    would matter below 1e-8 of the largest singular value: far below what any rank keeps.
    """
    gram = torch.zeros(width, width, dtype=torch.float64)
    for batch in batches:
        rows = batch.double()
        gram.addmm_(rows.T, rows)
    eigenvalues, vectors = torch.linalg.eigh(gram)  # smallest first
    return eigenvalues.flip(0), vectors.flip(1).T


def compute_factors(
    networks: MemoryNetworks, layers: tuple[int, ...], choice: RankChoice, progress: Callable[[int, int], None]
) -> Factors:
    """The first right singular vectors of each layer's rows [vocab_size, d]. `progress` counts networks run."""
    vocab_size, parts = networks.config.vocab_size, []

    def rows_of(done: int, layer: int) -> Iterator[Tensor]:
        for tokens in networks.batches():
            yield networks.rows(layer, tokens)
            progress(done * vocab_size + tokens.stop, len(layers) * vocab_size)

    for done, layer in enumerate(layers):
        eigenvalues, vectors = main_directions(rows_of(done, layer), networks.config.hidden_size)
        parts.append(vectors[: choice.of(eigenvalues)].to(torch.bfloat16))
    values = torch.cat(parts).contiguous().view(torch.uint16).numpy()
    return Factors(np.ascontiguousarray(values), tuple(map(len, parts)), choice.describe(layers))


def directions(factors: Factors, layers: tuple[int, ...]) -> dict[int, Tensor]:
    """By layer, float32 [rank, d]."""
    values = torch.from_numpy(factors.values).view(torch.bfloat16).float()
    return dict(zip(layers, values.split(factors.ranks), strict=True))
