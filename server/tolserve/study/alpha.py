"""Feed-forward outputs scaled at inference, `alpha * FFN(...)` (paper Fig. 7, Table 1).

Memory and flex models scale their rows, a base model its FFNs' outputs; flex's FFN-C is left as it is. What depends
on remembering falls with alpha before what depends on structure does, says the paper.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tolserve.study.pictures import curves
from tolserve.study.report import Study, StudyError
from tolserve.study.tasks import Results, Tasks, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.0)  # the paper's, and what lies below


def run(
    models: Sequence[Path],
    tasks: Tasks,
    alphas: Sequence[float] = ALPHAS,
    progress: Callable[[int, int], None] = quiet,
) -> Study:
    """One row per model and alpha. Raises StudyError, and what `load` and `Tasks.read` raise."""
    if not alphas:
        raise StudyError("--alphas: give at least one")
    results, total = Results.of(models, tasks), len(models) * len(alphas)
    for name, reading in results.readings.items():
        for alpha in alphas:
            progress(len(results.rows), total)
            results.add({"model": name, "alpha": alpha}, reading.score(scale=alpha))
    progress(total, total)
    return results.study("alpha")


def draw(study: Study, figure: "Figure") -> None:
    """A panel per measure, a line per model, alpha falling from left to right."""
    curves(figure, study.rows, x="alpha", line="model", falling=True)
