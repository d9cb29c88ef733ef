"""The commands `tolserve study NAME`: settings to a study, and a study to files and the terminal.

Each study is a module with `run`, which is called without the command line too, and `draw`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tolserve.settings import Options
from tolserve.study.settings import (
    StudyAlphaSettings,
    StudyCompareSettings,
    StudyDecodeCostSettings,
    StudyDropLayerSettings,
    StudyLowrankSettings,
    StudyOptions,
    StudyParamsSettings,
    StudyPruneSettings,
    StudyQuantizeSettings,
    StudyTkvSettings,
    TaskOptions,
)

_VOCABULARY = 8192  # of decode-cost: the random table takes 134 MB

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


def prune(settings: StudyPruneSettings) -> None:
    from tolserve.study.prune import Calibration, draw, run

    calibration = Calibration(settings.calibration, settings.sequences)
    finish(
        settings,
        lambda progress: run(settings.model, tasks(settings), calibration, settings.methods, progress),
        draw,
    )


def tkv(settings: StudyTkvSettings) -> None:
    from tolserve.study.tkv import draw, run

    names = ("layer", "clusters", "cells", "sample", "projection", "seed")
    given = {name: getattr(settings, name) for name in names} | {"tokens": settings.token}
    finish(
        settings,
        lambda progress: run(settings.model, **given, progress=progress),
        draw,
        packages=("matplotlib", "sklearn"),
    )


def compare(settings: StudyCompareSettings) -> None:
    from tolserve.study.compare import Shape, draw, recipe_of, run, seeds_of
    from tolserve.study.tasks import Tasks
    from tolserve.train.loop import keep_freed_memory
    from tolserve.train.ranks import join

    keep_freed_memory()
    given = settings.model_dump(mode="json")
    shape = Shape(*(given[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")))
    recipe = recipe_of(given)
    tasks = None
    if settings.text or settings.blimp is not None:
        tasks = Tasks(tuple(settings.text), None, settings.length, settings.blimp, settings.pairs)
    seeds = seeds_of(settings.variants)
    with join(settings.device) as ranks:
        finish(
            settings,
            lambda progress: run(seeds, shape, recipe, settings.out, settings.save_every, tasks, progress, ranks),
            draw,
            shown=ranks.first,
        )


def decode_cost(settings: StudyDecodeCostSettings) -> None:
    from tolserve.study.compare import Shape
    from tolserve.study.decode_cost import Setup, draw, preset_shapes, run, shapes

    if settings.preset is not None:
        configs = preset_shapes(settings.preset, settings.vocab_size)
    else:
        sizes = (settings.hidden_size, settings.num_hidden_layers, settings.num_attention_heads)
        configs = shapes(Shape(*sizes, settings.vocab_size or _VOCABULARY))
    setup = Setup(**settings.model_dump(include=set(Setup.__dataclass_fields__)))
    finish(settings, lambda progress: run(configs, setup, settings.out, progress), draw)


def tasks(settings: TaskOptions) -> "Tasks":
    from tolserve.study.tasks import Tasks

    return Tasks(tuple(settings.text), settings.tokens, settings.length, settings.blimp, settings.pairs)


def finish(
    settings: StudyOptions,
    run: "Callable[[Callable[[int, int], None]], Study]",
    draw: "Draw",
    packages: tuple[str, ...] = ("matplotlib",),
    shown: bool = True,
) -> None:
    """Run a study under a progress bar, write its files, and print its table or JSON; all but the run only if `shown`.
    `packages` of the extra `study` are asked for first."""
    import torch

    from tolserve.study.report import render, require, write

    require(*packages)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with tqdm(unit="case", file=sys.stderr, disable=not shown) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        study = run(progress)
    if not shown:
        return
    paths = write(study, settings.out, lambda figure: draw(study, figure))
    if settings.json_output:
        print(json.dumps(asdict(study), indent=2))
        return
    print("\n".join((render(study.rows), *study.notes)))
    print(f"\nwritten: {', '.join(map(str, paths))}")


COMMANDS: dict[str, tuple[type[Options], Callable[[Any], None]]] = {
    "params": (StudyParamsSettings, params),
    "alpha": (StudyAlphaSettings, alpha),
    "drop-layer": (StudyDropLayerSettings, drop_layer),
    "quantize": (StudyQuantizeSettings, quantize),
    "lowrank": (StudyLowrankSettings, lowrank),
    "prune": (StudyPruneSettings, prune),
    "tkv": (StudyTkvSettings, tkv),
    "compare": (StudyCompareSettings, compare),
    "decode-cost": (StudyDecodeCostSettings, decode_cost),
}
