"""The commands `tolserve study NAME`: settings to a study, and a study to files and the terminal.

Each study is a module with `run`, which is called without the command line too, and `draw`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from tqdm import tqdm

from tolserve.settings import (
    StudyAlphaSettings,
    StudyDropLayerSettings,
    StudyLowrankSettings,
    StudyOptions,
    StudyParamsSettings,
    StudyQuantizeSettings,
    TaskOptions,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tolserve.study.report import Study
    from tolserve.study.tasks import Tasks

    Draw = Callable[[Study, Figure], None]


def params(settings: StudyParamsSettings) -> None:
    from tolserve.study.params import render, report

    rows = report()
    print(json.dumps(rows, indent=2) if settings.json_output else render(rows))


def alpha(settings: StudyAlphaSettings) -> None:
    from tolserve.study.alpha import draw, run

    finish(settings, lambda progress: run(settings.model, tasks(settings), settings.alphas, progress), draw)


def drop_layer(settings: StudyDropLayerSettings) -> None:
    from tolserve.study.drop_layer import draw, run

    finish(settings, lambda progress: run(settings.model, tasks(settings), progress), draw)


def quantize(settings: StudyQuantizeSettings) -> None:
    from tolserve.study.quantize import draw, run

    finish(settings, lambda progress: run(settings.model, tasks(settings), settings.group_size, progress), draw)


def lowrank(settings: StudyLowrankSettings) -> None:
    from tolserve.study.lowrank import draw, run

    finish(
        settings,
        lambda progress: run(settings.model, tasks(settings), settings.cuts, settings.energies, progress),
        draw,
    )


def tasks(settings: TaskOptions) -> "Tasks":
    from tolserve.study.tasks import Tasks

    return Tasks(tuple(settings.text), settings.tokens, settings.length, settings.blimp, settings.pairs)


def finish(
    settings: StudyOptions,
    run: "Callable[[Callable[[int, int], None]], Study]",
    draw: "Draw",
    packages: tuple[str, ...] = ("matplotlib",),
) -> None:
    """Run a study under a progress bar, write its files, and print its table or JSON. `packages` of the extra `study`
    are asked for first."""
    import torch

    from tolserve.study.report import render, require, write

    require(*packages)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with tqdm(unit="case", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        study = run(progress)
    paths = write(study, settings.out, lambda figure: draw(study, figure))
    if settings.json_output:
        print(json.dumps(asdict(study), indent=2))
        return
    print(render(study.rows))
    print(f"\nwritten: {', '.join(map(str, paths))}")
