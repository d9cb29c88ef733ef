"""What the studies' pictures write beside their axes."""

import pytest
from matplotlib.figure import Figure

from tolserve.study.pictures import logarithmic


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (53.0, 97.0, {"60", "70", "80", "90"}),  # within a power of ten: perplexities of pruned models
        (1.0, 1.4, {"1", "1.1", "1.2", "1.3"}),  # relative perplexities
        (50.0, 20_000.0, {"100", "1000", "10000"}),
    ],
)
def test_a_logarithmic_axis_is_labelled_in_plain_numbers(low: float, high: float, expected: set[str]) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [low, high])
    logarithmic(axes)
    figure.canvas.draw()
    bottom, top = axes.get_ylim()
    ticks = axes.yaxis.get_ticklabels(which="both")
    texts = {tick.get_text() for tick in ticks if bottom <= tick.get_position()[1] <= top} - {""}
    assert expected <= texts
    for text in texts:
        float(text)  # no powers, no mathematics
