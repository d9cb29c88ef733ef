"""Singular spectra of each layer's rows over the vocabulary, and rows of lower rank (paper Table 8, Fig. 13).

A layer's rows [V, d] become coordinates [V, r] in r directions [r, d], both in bf16 as a lowrank table holds them. That
is less to store only for `r <= V d / (V + d)`. Ranks are cut alike in all layers, or as each layer's energy allows:
the least that keeps a share of the rows' squared norm.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tolserve.model.lowrank import RankChoice, main_directions
from tolserve.study.evaluate import Rows, network_rows
from tolserve.study.pictures import measures, panels
from tolserve.study.quantize import rounded_rows
from tolserve.study.report import Study, StudyError
from tolserve.study.tasks import Results, Tasks, quiet
from tolserve.tol.encoding import BF16

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CUTS = (0.1, 0.2, 0.3, 0.4, 0.5)  # the paper's
ENERGIES = (0.999, 0.99, 0.97, 0.95, 0.9, 0.8)


def run(
    models: Sequence[Path],
    tasks: Tasks,
    cuts: Sequence[float] = CUTS,
    energies: Sequence[float] = ENERGIES,
    progress: Callable[[int, int], None] = quiet,
) -> Study:
    """Per model a row for its bf16 table, one per uniform cut, one per share of energy.

    `rank` is the layers' mean, `saved` the share of the bf16 table's bytes that factors and coordinates do without,
    negative if they take more. `spectra` in the extra: per model and layer the singular values, largest first, and
    `ranks` of each case. Raises StudyError for a base model or a share outside 0 to 1.
    """
    if bad := [share for share in (*cuts, *energies) if not 0 < share < 1]:
        raise StudyError(f"--cuts and --energies: {bad[0]} is no share between 0 and 1")
    results, total = Results.of(models, tasks), len(models) * (1 + len(cuts) + len(energies))
    spectra, breaks_even = {}, {}
    for name, reading in results.readings.items():
        rows = network_rows(reading.studied)
        layers = [main_directions([layer], layer.shape[1]) for layer in rows.unbind(1)]
        spectra[name] = [eigenvalues.clamp(min=0).sqrt().tolist() for eigenvalues, _ in layers]
        vocab_size, count, width = rows.shape
        breaks_even[name] = vocab_size * width // (vocab_size + width)
        progress(len(results.rows), total)
        whole = {"kind": "full", "share": None, "rank": float(width), "saved": 0.0}
        results.add({"model": name, **whole}, reading.score(rounded_rows(rows, BF16)))
        for kind, share in [("cut", share) for share in cuts] + [("energy", share) for share in energies]:
            progress(len(results.rows), total)
            ranks = _ranks(kind, share, [eigenvalues for eigenvalues, _ in layers])
            saved = 1 - sum(ranks) * (vocab_size + width) / (vocab_size * count * width)
            directions = [vectors[:rank] for (_, vectors), rank in zip(layers, ranks, strict=True)]
            case = {"model": name, "kind": kind, "share": share, "rank": sum(ranks) / count, "saved": saved}
            # Without a name they are gone before the next ones, as large as the rows, are made.
            results.add(case, reading.score(of_rank(rows, directions)))
            results.details[-1]["ranks"] = ranks
    progress(total, total)
    return results.study("lowrank", spectra=spectra, breaks_even_rank=breaks_even)


def _ranks(kind: str, share: float, spectra: Sequence[Tensor]) -> list[int]:
    if kind == "cut":
        return [max(1, round(len(eigenvalues) * (1 - share))) for eigenvalues in spectra]
    choice = RankChoice(None, share, step=1)
    return [choice.of(eigenvalues) for eigenvalues in spectra]


def of_rank(rows: Rows, directions: Sequence[Tensor]) -> Rows:
    """Rows [V, N, d] rebuilt from bf16 coordinates in each layer's orthonormal directions [r, d], those in bf16 too."""
    result = torch.empty_like(rows)
    for layer, vectors in enumerate(directions):
        factor = vectors.to(torch.bfloat16).float()
        result[:, layer] = (rows[:, layer] @ factor.T).to(torch.bfloat16).float() @ factor
    return result


def draw(study: Study, figure: "Figure") -> None:
    """The first model's spectra, a line per layer; then a panel per measure over the storage saved."""
    titles = measures(study.rows[0])
    first, *rest = panels(figure, ["singular values, largest first", *titles])
    _draw_spectra(first, next(iter(study.extra["spectra"].values())))
    for axes, title in zip(rest, titles, strict=True):
        for name in dict.fromkeys(row["model"] for row in study.rows):
            for kind, style in (("cut", "o-"), ("energy", "s--")):
                rows = [row for row in study.rows if row["model"] == name and row["kind"] in ("full", kind)]
                points: list[tuple[Any, Any]] = sorted((100 * row["saved"], row[title]) for row in rows)
                axes.plot(*zip(*points, strict=True), style, markersize=4, label=f"{name}, {kind}")
        axes.set_xlabel("storage saved, %")
        axes.legend(fontsize=8)


def _draw_spectra(axes: "Axes", spectra: Sequence[Sequence[float]]) -> None:
    for layer, values in enumerate(spectra):
        color = (layer / max(1, len(spectra) - 1), 0.3, 1 - layer / max(1, len(spectra) - 1))
        axes.semilogy([value / values[0] for value in values], linewidth=1, color=color, label=f"layer {layer}")
    axes.set_xlabel("rank; values over each layer's largest")
    axes.legend(fontsize=6, ncols=-(-len(spectra) // 8))
