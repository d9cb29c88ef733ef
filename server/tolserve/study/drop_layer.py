"""One layer's feed-forward output left out, every layer in turn (paper Fig. 4 and 12).

A memory or flex model loses the layer's row, a base model the FFN's output; attention stays.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tolserve.study.pictures import curves
from tolserve.study.report import Study
from tolserve.study.tasks import Results, Tasks, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def run(models: Sequence[Path], tasks: Tasks, progress: Callable[[int, int], None] = quiet) -> Study:
    """Per model a row for the whole of it (`dropped` None), then one for each layer that is left out.

    `rel` columns are over the whole model's: 1.1 of a perplexity is 10% worse, 0.9 of an accuracy too (None over an
    accuracy of 0). Raises what `load` and `Tasks.read` raise.
    """
    results = Results.of(models, tasks)
    layers_of = {name: reading.studied.config.num_hidden_layers for name, reading in results.readings.items()}
    total = sum(layers_of.values()) + len(layers_of)
    for name, reading in results.readings.items():
        whole = reading.score()
        for layer in (None, *range(layers_of[name])):
            progress(len(results.rows), total)
            kept = [float(index != layer) for index in range(layers_of[name])]
            scores = whole if layer is None else reading.score(scale=kept)
            relative = {
                f"rel {key}": value / whole.columns[key] if whole.columns[key] else None
                for key, value in scores.columns.items()
            }
            results.add({"model": name, "dropped": layer}, scores, **relative)
    progress(total, total)
    return results.study("drop-layer")


def draw(study: Study, figure: "Figure") -> None:
    """A panel per measure, relative to the whole model: a line per model over the layer that was left out."""
    rows = [row for row in study.rows if row["dropped"] is not None]
    curves(figure, rows, x="dropped", line="model", names=[name for name in rows[0] if name.startswith("rel ")])
