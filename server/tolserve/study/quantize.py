"""Tables of 16, 8 and 4 bits a value (paper Table 7), with the arithmetic that `tolserve table build` and serving have.

Rows are encoded and decoded in memory, by the encoder that writes tables and the kernel that reads them.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tolkernels import add_rows
from tolserve.model.config import ModelConfig
from tolserve.model.quantise import encode_rows
from tolserve.study.evaluate import Rows, network_rows
from tolserve.study.pictures import measures, panels
from tolserve.study.report import Study
from tolserve.study.tasks import Reading, Results, Scores, Tasks, quiet
from tolserve.tol.encoding import GROUP_SIZE, Encoding, RowLayout, Values
from tolserve.tol.writer import lay_out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALUES: tuple[Values, ...] = ("bf16", "int8", "int4")
UNROUNDED = "float32"  # the networks' own output, which no table holds


def run(
    models: Sequence[Path],
    tasks: Tasks,
    group_size: int = GROUP_SIZE,
    progress: Callable[[int, int], None] = quiet,
) -> Study:
    """Per model a row for its networks' own outputs, then one per encoding: bytes, error and scores.

    `bytes` are those of the table's records as they lie in files, `error` the root mean square of what rounding
    changes, over that of the rows. Raises StudyError for a base model, EncodingError for a group size that does not
    divide the rows, and what `load` and `Tasks.read` raise.
    """
    results, total = Results.of(models, tasks), len(models) * (1 + len(VALUES))
    for name, reading in results.readings.items():
        rows = network_rows(reading.studied)
        progress(len(results.rows), total)
        sizes: dict[str, Any] = {"encoding": UNROUNDED, "bytes": None, "error": 0.0}
        results.add({"model": name, **sizes}, reading.score(rows))
        for values in VALUES:
            progress(len(results.rows), total)
            encoding = Encoding(values, None if values == "bf16" else group_size)
            error, scores = _rounded(reading, rows, encoding)
            sizes = {"encoding": values, "bytes": table_bytes(reading.studied.config, encoding), "error": error}
            results.add({"model": name, **sizes}, scores)
    progress(total, total)
    return results.study("quantize", group_size=group_size)


def _rounded(reading: Reading, rows: Rows, encoding: Encoding) -> tuple[float, Scores]:
    """Error and scores. A function, since the rounded rows, as large as the rows, go where it ends."""
    rounded = rounded_rows(rows, encoding)
    return relative_error(rounded, rows), reading.score(rounded)


def relative_error(rounded: Rows, rows: Rows) -> float:
    """Root mean square of what rounding changes, over that of the rows. Summed in float64: a table of the paper's 1B
    has 6e9 values, and a float32 sum of squares stops growing long before."""
    layers = zip(rounded.unbind(1), rows.unbind(1), strict=True)
    sums = [((after - before).double().square().sum(), before.double().square().sum()) for after, before in layers]
    changed, whole = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    return math.sqrt(changed / whole)


def rounded_rows(rows: Rows, encoding: Encoding) -> Rows:
    """What is left of rows [V, N, d] in a table of this encoding. Raises EncodingError, CheckpointError."""
    (width,) = set(encoding.widths(1, rows.shape[2]))
    layout = RowLayout(0, width, encoding.values, encoding.group_size)
    how: dict[str, Any] = {"offset": layout.offset, "values": layout.values, "group_size": layout.group_size}
    slots, zeros, ones = torch.arange(len(rows)), torch.zeros(len(rows), width), torch.ones(width)
    result = torch.empty_like(rows)
    for layer in range(rows.shape[1]):
        # The norm that comes with the sum is not asked for.
        result[:, layer] = add_rows(encode_rows(rows[:, layer], encoding), slots, zeros, ones, 1e-5, **how)[0]
    return result


def table_bytes(config: ModelConfig, encoding: Encoding) -> int:
    """Of the records of a table of all layers, padding included."""
    manifest = lay_out(
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        fingerprint="none yet",
        encoding=encoding,
    )
    return manifest.record_stride * config.vocab_size


def draw(study: Study, figure: "Figure") -> None:
    """A panel per measure, over the table's bytes; a dashed line is the networks' own output."""
    titles = measures(study.rows[0])
    for axes, title in zip(panels(figure, titles), titles, strict=True):
        for color, name in enumerate(dict.fromkeys(row["model"] for row in study.rows)):
            rows = [row for row in study.rows if row["model"] == name]
            points = [(row["bytes"] / 1e6, row[title]) for row in rows if row["bytes"] is not None]
            axes.plot(*zip(*points, strict=True), marker="o", color=f"C{color}", label=name)
            axes.axhline(rows[0][title], linestyle="--", linewidth=1, color=f"C{color}")
        axes.set_xlabel("table, MB: 4, 8, 16 bits")
        axes.legend(fontsize=8)
