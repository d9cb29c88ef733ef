"""Draws what frontier.py measured: tokens per second against resident bytes, one panel for each batch size.

    python benchmarks/frontier_plot.py results/frontier.json docs/images/frontier.svg

A line joins the cache sizes of one table. Needs matplotlib (`pip install '.[bench]'`).
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

GB = 1e9
COLOURS = {"16-bit": "#1b6ca8", "int8": "#2a9d5c", "int4": "#c4571b"}  # of our engine's points, by weights
MARKERS = {"bf16": "o", "int8": "s", "int4": "^"}  # of memory's points, by the table's encoding
DENSE = {"base": "D", "llama.cpp": "*"}


def draw(axes: Axes, points: list[dict[str, Any]]) -> None:
    for (model, weights, table), group in groupby(points, key=lambda p: (p["model"], p["weights"], p["table"])):
        rows = sorted(group, key=lambda point: point["resident_bytes"])
        label = f"memory, {weights} weights, {table} table" if table else f"{model} {weights}"
        axes.plot(
            [row["resident_bytes"] / GB for row in rows],
            [row["tokens_per_second"] for row in rows],
            marker=MARKERS[table] if table else DENSE[model],
            color=COLOURS.get(weights, "black"),
            markerfacecolor=None if table else "white",
            markersize=6 if table else 9,
            linewidth=1,
            label=label if table else None,
        )
        if not table:
            place = rows[0]["resident_bytes"] / GB, rows[0]["tokens_per_second"]
            axes.annotate(label, place, (6, 5), textcoords="offset points", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path, help=".svg or .png")
    args = parser.parse_args()
    points = json.loads(args.result.read_text())["points"]
    batches = sorted({point["batch"] for point in points})
    figure, panels = pyplot.subplots(1, len(batches), figsize=(5.5 * len(batches), 4.8), squeeze=False)
    for axes, batch in zip(panels[0], batches, strict=True):
        draw(axes, [point for point in points if point["batch"] == batch])
        axes.set(title=f"batch {batch}", xlabel="resident: weights, keys and values, cache (GB)", xlim=0, ylim=0)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens per second")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(args.image)


if __name__ == "__main__":
    main()
