"""Base, flex and memory trained with one recipe (paper Table 2, Fig. 9 and 10): at equal total parameters, and memory
beside a base model of as many active ones.

Each run has a folder of its own, NAME-sSEED; one that is finished is taken as it is, one that was stopped goes on.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from tolserve.model.config import ModelConfig
from tolserve.model.presets import VARIANTS
from tolserve.study.evaluate import load
from tolserve.study.params import count_parameters
from tolserve.study.pictures import logarithmic
from tolserve.study.report import Study, StudyError, provenance, require
from tolserve.study.tasks import Tasks, quiet
from tolserve.train.data import read_documents
from tolserve.train.loop import Run
from tolserve.train.ranks import ALONE, Ranks
from tolserve.train.recipe import Recipe, claim
from tolserve.train.tokenizer import train_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As many active parameters as `memory`, all of them computed.
SMALL = "base-small"
# By rising held-out loss, as the paper found it: Table 2, Fig. 9 and 10.
PAPER_ORDER = (*VARIANTS, SMALL)
# Of K, as the paper's is for base and memory; flex's follows from it.
_MULTIPLE = 8


@dataclass(frozen=True)
class Shape:
    """What all variants share but for `base-small`, which has its own width."""

    hidden_size: int
    layers: int
    heads: int
    vocab_size: int


def variant_config(name: str, shape: Shape, length: int) -> ModelConfig:
    """A variant at a shape. FFNs of base and memory have 8 d^2 parameters, K rounded up to a multiple of 8; FFN-M of
    flex has (8 - beta) / 8 of that K. Raises StudyError for an unknown name, ConfigError for a shape that cannot be."""
    if name not in PAPER_ORDER:
        raise StudyError(f"{name!r} is no variant; there are {', '.join(PAPER_ORDER)}")
    variant, beta = VARIANTS.get(name, VARIANTS["base"])
    whole = math.ceil(8 * shape.hidden_size / 3 / _MULTIPLE) * _MULTIPLE
    config = ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=whole * (8 - beta) // 8,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        ffn_variant=variant,
        flex_beta=beta,
        max_position_embeddings=length,
    )
    return _small(config) if name == SMALL else config


def _small(base: ModelConfig) -> ModelConfig:
    """A base model with the active parameters of a memory model of `base`'s shape.

    12 d^2 N parameters give the width, rounded down to what the heads can share; K makes up the difference.
    """
    wanted = count_parameters(replace(base, ffn_variant="memory")).active
    layers, unit = base.num_hidden_layers, 2 * base.num_attention_heads
    size = int(math.sqrt(wanted / (12 * layers))) // unit * unit
    if size < unit:
        raise StudyError(f"{SMALL} would be narrower than {unit}; give --hidden-size more, or leave it out")
    narrow = replace(base, hidden_size=size, intermediate_size=_MULTIPLE)
    per_cell = 3 * size * layers
    missing = wanted - count_parameters(narrow).active
    return replace(narrow, intermediate_size=_MULTIPLE + round(missing / per_cell / _MULTIPLE) * _MULTIPLE)


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """The recipe of all runs: what the options say, the rest as in the paper (section 4); clipping, which it does not
    mention, at 1."""
    given = {field.name: options[field.name] for field in fields(Recipe) if field.name in options}
    given |= {"data": tuple(options["data"]), "seed": 0}
    return Recipe(**given, weight_decay=0.1, beta1=0.9, beta2=0.95, z_loss=1e-6, clip=1.0)


def folder_name(name: str, seed: int) -> str:
    return f"{name.replace('flex-', 'flex')}-s{seed}"


def seeds_of(variants: Sequence[str]) -> dict[str, int]:
    """`base:3` is three seeds of base, `base` one. Raises StudyError for an unknown name or no seeds."""
    seeds = {}
    for given in variants:
        name, colon, count = given.partition(":")
        count = count if colon else "1"
        if name not in PAPER_ORDER or name in seeds or not count.isdecimal() or int(count) < 1:
            raise StudyError(
                f"--variants {given}: name each of {', '.join(PAPER_ORDER)} once at most, as NAME or NAME:SEEDS"
            )
        seeds[name] = int(count)
    return seeds


def planned(seeds: Mapping[str, int]) -> list[tuple[str, int]]:
    """Variant and seed of each run, the first seed of every variant before any second one."""
    runs = [(seed, name) for name, count in seeds.items() for seed in range(count)]
    return [(name, seed) for seed, name in sorted(runs, key=lambda run: run[0])]


def train_run(folder: Path, config: ModelConfig, recipe: Recipe, save_every: int, ranks: Ranks) -> None:
    """Train one run, go on with it, or leave it as it is when it is finished.

    Raises TrainError for a folder that holds another recipe.
    """
    if (folder / "figures.json").exists():
        claim(folder, config, recipe)
        return
    run = Run(folder, config, recipe, ranks)
    run.train(save_every)
    run.finish()


def measure(folder: Path, name: str, seed: int, tasks: Tasks | None) -> dict[str, Any]:
    """Figures of a finished run: held-out loss as its training left it, parameters, `tasks`, the training curve.

    Raises StudyError for one that was trained without held-out text.
    """
    figures = json.loads((folder / "figures.json").read_text())
    if "held_out" not in figures:
        raise StudyError(f"{folder / 'figures.json'} has no held-out loss; train it with --held-out")
    config = ModelConfig.load(folder)
    count = count_parameters(config)
    with (folder / "loss.csv").open() as file:
        curve = [(int(row["tokens"]), float(row["loss"])) for row in csv.DictReader(file)]
    zeroed = figures.get("held_out_memory_zeroed")
    return {
        "variant": name,
        "seed": seed,
        "d": config.hidden_size,
        "K": config.intermediate_size,
        "active": count.active,
        "total": count.total,
        "training_tokens": figures["training_tokens"],
        "bits_per_byte": figures["held_out"]["bits_per_byte"],
        "perplexity": math.exp(figures["held_out"]["nats_per_token"]),
        "bits_per_byte_zeroed": zeroed and zeroed["bits_per_byte"],
        "tasks": tasks.read(load(folder)).score().columns if tasks is not None else {},
        "curve": curve,
    }


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant, means over its seeds; `spread` is the largest bits per byte less the smallest."""
    rows = []
    for name in PAPER_ORDER:
        if not (of := [run for run in runs if run["variant"] == name]):
            continue
        bits = [run["bits_per_byte"] for run in of]
        same = ("variant", "d", "K", "active", "total", "training_tokens")
        row = {key: of[0][key] for key in same} | {"seeds": len(of), "bits_per_byte": mean(bits)}
        row["spread"] = max(bits) - min(bits) if len(of) > 1 else None
        for key in ("perplexity", "bits_per_byte_zeroed"):
            row[key] = mean(run[key] for run in of) if of[0][key] is not None else None
        rows.append(row | {key: mean(run["tasks"][key] for run in of) for key in of[0]["tasks"]})
    return rows


def paper_order(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each two neighbours in the paper's order: by how many bits per byte the first is ahead of the second.

    `margin` is half the 95% confidence interval of that, by Student's t: the deviation over seeds is pooled over all
    variants that have several, since a variant with one seed has none of its own, and `freedom` counts what it is
    pooled from. `clear`: the interval leaves out 0. Margin and clear are None where no variant has two seeds.
    """
    from scipy import stats

    bits = {name: [run["bits_per_byte"] for run in runs if run["variant"] == name] for name in PAPER_ORDER}
    several = [of for of in bits.values() if len(of) > 1]
    freedom = sum(len(of) - 1 for of in several)
    deviation = math.sqrt(sum(stdev(of) ** 2 * (len(of) - 1) for of in several) / freedom) if freedom else None
    quantile = float(stats.t.ppf(0.975, freedom)) if freedom else math.nan
    present = [name for name in PAPER_ORDER if bits[name]]
    found = []
    for better, worse in pairwise(present):
        ahead = mean(bits[worse]) - mean(bits[better])
        scale = math.sqrt(1 / len(bits[better]) + 1 / len(bits[worse]))
        margin = None if deviation is None else quantile * deviation * scale
        clear = None if margin is None else abs(ahead) > margin
        pair = {"better": better, "worse": worse, "ahead": ahead, "as_the_paper": ahead > 0}
        found.append(pair | {"clear": clear, "margin": margin, "freedom": freedom})
    return found


def _order_in_words(pair: dict[str, Any]) -> str:
    sure = "no variant has two seeds, so the spread is not known"
    if pair["clear"] is not None:
        side = "beyond" if pair["clear"] else "within"
        sure = f"{side} the 95% margin of {pair['margin']:.4f} over seeds (t, {pair['freedom']} degrees of freedom)"
    order = "as in the paper" if pair["as_the_paper"] else "NOT as in the paper"
    return f"{pair['better']} before {pair['worse']}: by {pair['ahead']:.4f} bits per byte, {order}, {sure}"


def run(
    seeds: Mapping[str, int],
    shape: Shape,
    recipe: Recipe,
    out: Path,
    save_every: int = 250,
    tasks: Tasks | None = None,
    progress: Callable[[int, int], None] = quiet,
    ranks: Ranks = ALONE,
) -> Study:
    """Train what is not trained yet, and compare. `seeds` says how many runs each variant gets, seeds 0, 1, ...;
    `recipe`'s own seed does not count. `tasks` are measured beside the held-out text, on the CPU. Without a tokenizer
    in `recipe` one is trained for all runs. Several processes train each run together, and the first one measures: the
    others' studies are empty. Raises StudyError, TrainError, ConfigError, DataError."""
    require("scipy")
    if recipe.held_out is None:
        raise StudyError("compare needs --held-out, text that no run trains on")
    configs = {name: variant_config(name, shape, recipe.length) for name in seeds}
    with ranks.first_ahead():
        recipe = _with_tokenizer(recipe, shape.vocab_size, out)
    measured: list[dict[str, Any]] = []
    runs = planned(seeds)
    for name, seed in runs:
        progress(len(measured), len(runs))
        folder = out / folder_name(name, seed)
        train_run(folder, configs[name], replace(recipe, seed=seed), save_every, ranks)
        if ranks.first:
            measured.append(measure(folder, name, seed, tasks))
    progress(len(runs), len(runs))
    facts = {"shape": vars(shape), "recipe": {key: value for key, value in vars(recipe).items() if key != "seed"}}
    facts |= tasks.facts() if tasks is not None else {}
    order = paper_order(measured)
    extra = {"paper_order": order, "runs": measured}
    return Study("compare", facts | provenance(), summarise(measured), extra, [_order_in_words(pair) for pair in order])


def _with_tokenizer(recipe: Recipe, vocab_size: int, out: Path) -> Recipe:
    if recipe.tokenizer is not None:
        return recipe
    path = out / "tokenizer.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        texts = (text for data in recipe.data for text in read_documents(Path(data)))
        write_tokenizer(train_tokenizer(texts, vocab_size), path)
    return replace(recipe, tokenizer=str(path))


def draw(study: Study, figure: "Figure") -> None:
    """Held-out loss against active and against total parameters, a point for each run; and the training curves."""
    figure.set_size_inches(15, 4.5)
    active, total, curves = figure.subplots(1, 3)
    _draw_losses(study.extra["runs"], "active", active)
    _draw_losses(study.extra["runs"], "total", total)
    for index, row in enumerate(study.rows):
        first = next(run for run in study.extra["runs"] if run["variant"] == row["variant"])
        tokens, losses = zip(*first["curve"], strict=True)
        curves.plot(tokens, losses, color=f"C{index}", label=f"{row['variant']}, seed {first['seed']}", linewidth=1)
    curves.set(xlabel="training tokens", ylabel="training loss, nats per token")
    logarithmic(curves)
    curves.legend()


def _draw_losses(runs: Sequence[dict[str, Any]], parameters: str, axes: "Axes") -> None:
    names = [name for name in PAPER_ORDER if any(run["variant"] == name for run in runs)]
    for index, name in enumerate(names):
        of = [run for run in runs if run["variant"] == name]
        places = [run[parameters] for run in of]
        axes.plot(places, [run["bits_per_byte"] for run in of], "o", color=f"C{index}", label=name)
    axes.set(xlabel=f"{parameters} parameters (without embeddings)", ylabel="held-out bits per byte")
    axes.legend()
