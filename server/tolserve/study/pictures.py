"""What the studies' pictures have in common. Whoever draws has matplotlib; importing this does not need it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = (4.2, 3.4)  # inches


def measures(row: dict[str, Any]) -> list[str]:
    """The columns of a table that Tasks measured."""
    return [name for name in row if name.startswith(("ppl ", "blimp "))]


def panels(figure: "Figure", titles: Sequence[str]) -> "list[Axes]":
    """One set of axes for each title, three beside each other, or two over two."""
    columns = 2 if len(titles) == 4 else min(3, len(titles))
    lines = -(-len(titles) // columns)
    figure.set_size_inches(_PANEL[0] * columns, _PANEL[1] * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    return grid[: len(titles)]


def curves(
    figure: "Figure",
    rows: Sequence[dict[str, Any]],
    *,
    x: str,
    line: str,
    falling: bool = False,
    names: Sequence[str] = (),
) -> None:
    """A panel per measure (or per column in `names`), a line for each value of the column `line`, over the column `x`.
    Perplexities, relative ones too, have a logarithmic axis."""
    titles = list(names) or measures(rows[0])
    for axes, title in zip(panels(figure, titles), titles, strict=True):
        for label in dict.fromkeys(row[line] for row in rows):
            points = [(row[x], row[title]) for row in rows if row[line] == label]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set_xlabel(x)
        if "ppl " in title:
            logarithmic(axes)
        if falling:
            axes.invert_xaxis()
        axes.legend(fontsize=8)


def logarithmic(axes: "Axes") -> None:
    """A logarithmic y axis that writes 60, not 6 x 10^1, and labels between powers of ten where few of them show."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
