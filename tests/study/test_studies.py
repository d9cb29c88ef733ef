"""Alpha, dropped layers, quantised and low-rank rows: each row of a table against an obvious computation."""

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tiny import TEXT, tiny_config
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.config import FfnVariant, ModelConfig
from tolserve.model.edits import table_rows
from tolserve.study import alpha, drop_layer, lowrank, quantize
from tolserve.study.blimp import accuracies, grouping, read_pairs
from tolserve.study.evaluate import Studied, load, loss_of, network_rows, perplexity_of, read_text
from tolserve.study.report import Study, StudyError
from tolserve.study.tasks import Tasks
from tolserve.tol.encoding import Encoding, EncodingError
from tolserve.tol.table import Table, describe

StudiedOf = Callable[[FfnVariant], Studied]


@pytest.fixture
def tasks(tmp_path: Path, blimp_zip: Path) -> Tasks:
    path = tmp_path / "prose.txt"
    path.write_text(TEXT * 2)
    return Tasks((path,), tokens=60, length=20, blimp=blimp_zip, pairs=2)


def scored(studied: Studied, tasks: Tasks, **how: object) -> dict[str, float]:
    """The columns that a row of the table must have, measured without the studies."""
    loss = loss_of(studied, read_text(studied, tasks.texts[0], tasks.tokens, 20), 20, **how)
    by_paradigm = accuracies(studied, read_pairs(studied, tasks.blimp, tasks.pairs), **how)
    groups = {"recall": ["irregular", "gender"], "structure": ["island", "distractor"], "all": list(by_paradigm)}
    accuracy = {f"blimp {group}": float(np.mean([by_paradigm[n] for n in names])) for group, names in groups.items()}
    return {"ppl prose": perplexity_of(loss), **accuracy}


def measured(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(("ppl ", "blimp "))}


def panels(study: Study, draw: Callable[[Study, Figure], None]) -> list[Axes]:
    """Those of the study's picture."""
    figure = Figure(layout="constrained")
    draw(study, figure)
    return [axes for axes in figure.axes if axes.get_visible()]


def logarithmic(panels: list[Axes]) -> list[str]:
    return [axes.get_title() for axes in panels if axes.get_yscale() == "log"]


def test_alpha_scales_every_model(studied_of: StudiedOf, tasks: Tasks) -> None:
    models = [studied_of(variant) for variant in ("base", "memory")]
    study = alpha.run([model.path for model in models], tasks, [1.0, 0.5, 0.0])
    assert [row["alpha"] for row in study.rows] == [1.0, 0.5, 0.0] * 2
    assert [row["model"] for row in study.rows] == [model.name for model in models for _ in range(3)]
    for row, model in zip(study.rows, [model for model in models for _ in range(3)], strict=True):
        assert measured(row) == pytest.approx(scored(model, tasks, scale=row["alpha"]))
    assert study.rows[0]["ppl prose"] != study.rows[1]["ppl prose"]
    facts = study.facts["models"][1]
    assert (facts["ffn_variant"], facts["blimp_pairs"], facts["length"]) == ("memory", 6, 20)
    assert facts["tokens"] == {"prose": 60}
    assert study.facts["blimp_groups"] == grouping()
    assert "blimp_groups" not in alpha.run([models[0].path], replace(tasks, blimp=None), [1]).facts
    shown = panels(study, alpha.draw)
    assert len(shown) == 4
    assert logarithmic(shown) == ["ppl prose"]
    assert alpha.run([models[0].path], tasks, [0.5]).rows == [study.rows[1]]


def test_each_layer_is_dropped_in_turn(studied_of: StudiedOf, tasks: Tasks) -> None:
    model = studied_of("flex")
    study = drop_layer.run([model.path], tasks)
    assert [row["dropped"] for row in study.rows] == [None, 0, 1]
    whole = scored(model, tasks)
    for row, scale in zip(study.rows, ([1, 1], [0, 1], [1, 0]), strict=True):
        expected = scored(model, tasks, scale=[float(value) for value in scale])
        assert measured(row) == pytest.approx(expected)
        for name, value in expected.items():
            assert row[f"rel {name}"] == (pytest.approx(value / whole[name]) if whole[name] else None)
    shown = panels(study, drop_layer.draw)
    assert len(shown) == 4
    assert logarithmic(shown) == ["rel ppl prose"]


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_a_quantised_row_scores_as_the_built_table(
    studied_of: StudiedOf, tasks: Tasks, tmp_path: Path, values: str
) -> None:
    model = studied_of("memory")
    group_size = None if values == "bf16" else 16
    build_table(model.path, tmp_path / "tol", BuildOptions(values, group_size))
    table = Table.open(tmp_path / "tol")
    rows = table_rows(table, range(model.config.vocab_size), range(2))
    rounded = quantize.rounded_rows(network_rows(model), Encoding(values, group_size))
    torch.testing.assert_close(rounded, rows, rtol=0, atol=0)
    study = quantize.run([model.path], tasks, 16)
    (row,) = (row for row in study.rows if row["encoding"] == values)
    assert measured(row) == pytest.approx(scored(model, tasks, rows=rows))
    assert row["bytes"] == describe(table)["stored_bytes"]
    exact = network_rows(model).double()
    assert row["error"] == pytest.approx(((rows - exact).square().sum() / exact.square().sum()).sqrt().item(), rel=1e-3)
    assert measured(study.rows[0]) == pytest.approx(scored(model, tasks), rel=1e-3)
    assert len(panels(study, quantize.draw)) == 4


def test_an_error_is_summed_without_loss() -> None:
    """A few large values, and so many small ones that a float32 sum of squares is deaf to most of them."""
    rows = torch.full((1 << 15, 2, 512), 0.25)
    rows[0] = 1000
    rounded = rows.clone()
    rounded[1:] *= 1.5
    small, large = ((1 << 15) - 1) * 1024 * 0.25**2, 1024 * 1000**2
    assert quantize.relative_error(rounded, rows) == pytest.approx((small / 4 / (small + large)) ** 0.5, rel=1e-6)
    assert abs(float((rounded - rows).norm() / rows.norm()) / (small / 4 / (small + large)) ** 0.5 - 1) > 1e-4


@pytest.mark.parametrize("study", [quantize, lowrank])
def test_changed_rows_are_held_once(
    studied_of: StudiedOf, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, study: Any
) -> None:
    """They are as large as the table, so two of them beside it decide whether a study fits."""
    name = "rounded_rows" if study is quantize else "of_rank"
    made: list[weakref.ref[torch.Tensor]] = []
    make = getattr(study, name)

    def watched(*arguments: Any) -> torch.Tensor:
        assert not [old for old in made if old() is not None]
        result = make(*arguments)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(study, name, watched)
    study.run([studied_of("memory").path], tasks, 16 if study is quantize else [0.5, 0.4])
    assert len(made) >= 3


def test_low_rank_rows_are_those_of_the_svd(studied_of: StudiedOf, tasks: Tasks) -> None:
    model = studied_of("memory")
    rows = network_rows(model)
    study = lowrank.run([model.path], tasks, cuts=[0.5], energies=[0.9])
    full, cut, energy = study.rows
    vocab_size, layers, width = rows.shape
    assert (full["rank"], cut["rank"]) == (32, 16)
    assert cut["saved"] == pytest.approx(1 - 16 * (vocab_size + width) / (vocab_size * width))
    ranks = []
    for layer, spectrum in enumerate(study.extra["spectra"][model.name]):
        values = np.linalg.svd(rows[:, layer].double().numpy(), compute_uv=False)
        np.testing.assert_allclose(spectrum, values, rtol=1e-6)
        shares = np.cumsum(values**2) / np.sum(values**2)
        ranks.append(next(rank for rank in range(1, width + 1) if shares[rank - 1] >= 0.9))
    assert study.extra["scores"][2]["ranks"] == ranks
    assert energy["rank"] == pytest.approx(sum(ranks) / layers)
    best = []
    for layer in range(layers):
        u, s, vh = np.linalg.svd(rows[:, layer].double().numpy(), full_matrices=False)
        best.append(torch.from_numpy((u[:, :16] * s[:16]) @ vh[:16]).float())
    approximate = torch.stack(best, 1)
    expected = scored(model, tasks, rows=approximate)["ppl prose"]
    assert cut["ppl prose"] == pytest.approx(expected, rel=0.005)  # bf16 in between
    assert abs(cut["ppl prose"] / full["ppl prose"] - 1) > 0.02
    breaks_even = study.extra["breaks_even_rank"][model.name]
    for rank, less in ((breaks_even, True), (breaks_even + 1, False)):
        assert (rank * (vocab_size + width) <= vocab_size * width) is less
    assert len(panels(study, lowrank.draw)) == 5


def test_a_model_is_named_by_as_much_as_tells_it_apart(
    model_dir_of: Callable[[ModelConfig], Path], tasks: Tasks, tmp_path: Path
) -> None:
    models = [tmp_path / parent / "model" for parent in ("one", "two")]
    for model in models:
        shutil.copytree(model_dir_of(tiny_config()), model)
    assert [row["model"] for row in alpha.run(models, tasks, [1]).rows] == ["one/model", "two/model"]
    assert [row["model"] for row in alpha.run(models[:1], tasks, [1]).rows] == ["model"]


def test_all_models_are_measured_in_windows_of_one_length(
    model_dir_of: Callable[[ModelConfig], Path], tasks: Tasks
) -> None:
    models = [model_dir_of(tiny_config(max_position_embeddings=context)) for context in (24, 128)]
    study = alpha.run(models, replace(tasks, length=None), [1])
    assert [model["length"] for model in study.facts["models"]] == [24, 24]
    (alone,) = alpha.run([models[1]], replace(tasks, length=24), [1]).rows
    assert measured(study.rows[1]) == measured(alone)
    with pytest.raises(StudyError, match="--length 25: .* takes 1 to 24"):
        alpha.run(models, replace(tasks, length=25), [1])


def test_what_cannot_be_measured_is_refused(studied_of: StudiedOf, tasks: Tasks, blimp_zip: Path) -> None:
    base, memory = studied_of("base").path, studied_of("memory").path
    with pytest.raises(StudyError, match="--text"):
        Tasks(())
    with pytest.raises(StudyError, match="called the same"):
        Tasks((Path("a/x.txt"), Path("b/x.jsonl")))
    with pytest.raises(StudyError, match="each once"):
        alpha.run([memory, memory], tasks)
    with pytest.raises(StudyError, match="--alphas"):
        alpha.run([memory], tasks, [])
    with pytest.raises(StudyError, match="base model"):
        quantize.run([base], tasks, 16)
    with pytest.raises(StudyError, match="base model"):
        lowrank.run([base], tasks)
    with pytest.raises(StudyError, match="no share"):
        lowrank.run([memory], tasks, cuts=[1.0])
    with pytest.raises(EncodingError, match="group size"):
        quantize.run([memory], tasks, 24)


def test_the_whole_is_deterministic(studied_of: StudiedOf, tasks: Tasks) -> None:
    model = load(studied_of("memory").path)
    first, second = (quantize.run([model.path], tasks, 16) for _ in range(2))
    assert first == second
