"""compare: the shapes of the variants, runs that resume and are skipped, and the report's arithmetic."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tiny import TEXT
from tolserve.cli import main
from tolserve.model.presets import SIZES, preset
from tolserve.study import compare
from tolserve.study.compare import PAPER_ORDER, SMALL, Shape, folder_name, paper_order, planned, variant_config
from tolserve.study.evaluate import load
from tolserve.study.params import count_parameters
from tolserve.study.report import StudyError, write
from tolserve.study.settings import StudyCompareSettings
from tolserve.study.tasks import Tasks
from tolserve.train.loop import Run, TrainError
from tolserve.train.recipe import Recipe

SHAPE = Shape(hidden_size=48, layers=2, heads=2, vocab_size=300)


def test_intermediate_sizes_follow_the_paper() -> None:
    for size in SIZES:
        expected = preset(size, "memory")
        shape = Shape(expected.hidden_size, 24, expected.num_attention_heads, expected.vocab_size)
        for variant in ("base", "memory"):
            assert variant_config(variant, shape, 2048) == replace(preset(size, variant))
    small = Shape(128, 8, 4, 4096)
    found = {name: variant_config(name, small, 512).intermediate_size for name in PAPER_ORDER}
    assert found == {"base": 344, "memory": 344, "flex-1": 301, "flex-2": 258, "flex-3": 215, SMALL: 208}
    assert variant_config(SMALL, small, 512).hidden_size == 72


@given(d=st.integers(3, 40), layers=st.integers(1, 30), heads=st.sampled_from([1, 2, 4]))
def test_the_variants_have_the_parameters_that_the_comparison_needs(d: int, layers: int, heads: int) -> None:
    shape = Shape(8 * d * heads, layers, heads, 500)
    counts = {name: count_parameters(variant_config(name, shape, 64)) for name in PAPER_ORDER}
    for name in ("flex-1", "flex-2", "flex-3", "memory"):
        assert counts[name].total == pytest.approx(counts["base"].total, rel=0.02)
    actives = [counts[name].active for name in ("memory", "flex-1", "flex-2", "flex-3", "base")]
    assert actives == sorted(actives)
    assert counts[SMALL].total == counts[SMALL].active
    cells_of_eight = 8 * 3 * variant_config(SMALL, shape, 64).hidden_size * layers
    assert abs(counts[SMALL].active - counts["memory"].active) <= cells_of_eight / 2


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(StudyError, match="no variant"):
        variant_config("flex-4", SHAPE, 64)
    with pytest.raises(StudyError, match="narrower than 16"):
        variant_config(SMALL, Shape(16, 2, 8, 300), 64)


def test_every_variant_comes_before_any_second_seed() -> None:
    assert planned({"base": 2, "memory": 3, "flex-1": 1}) == [
        ("base", 0),
        ("memory", 0),
        ("flex-1", 0),
        ("base", 1),
        ("memory", 1),
        ("memory", 2),
    ]
    assert [folder_name(name, 0) for name in ("base", "flex-1", SMALL)] == ["base-s0", "flex1-s0", "base-small-s0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Recipe:
    folder = tmp_path_factory.mktemp("text")
    for name, times in (("train", 20), ("unseen", 2)):
        (folder / f"{name}.txt").write_text(TEXT * times)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"held_out": str(folder / "unseen.txt"), "tokenizer": str(folder / "tokenizer.json")}
    rates = {"warmup": 2, "peak_lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95}
    size = {"batch": 2, "length": 24, "steps": 6, "z_loss": 1e-6, "clip": 1.0, "seed": 99}
    return Recipe(data=(str(folder / "train.txt"),), **names, **rates, **size)


@pytest.fixture(scope="module")
def shape(tokenizer: Tokenizer) -> Shape:
    return replace(SHAPE, vocab_size=tokenizer.get_vocab_size())


def test_runs_are_trained_resumed_and_skipped(
    tmp_path: Path, shape: Shape, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that is stopped and started again ends where one that was not ends, without training anything twice."""
    seeds = {"base": 2, "memory": 1, SMALL: 1}
    whole = compare.run(seeds, shape, recipe, tmp_path / "whole", 2)
    steps: list[str] = []
    train_step = Run.train_step

    def counted(run: Run, batch: Any) -> float:
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(run.out.name)
        return train_step(run, batch)

    monkeypatch.setattr(Run, "train_step", counted)
    with pytest.raises(KeyboardInterrupt):
        compare.run(seeds, shape, recipe, tmp_path / "stopped", 2)
    steps.clear()
    monkeypatch.setattr(Run, "train_step", lambda run, batch: steps.append(run.out.name) or train_step(run, batch))
    again = compare.run(seeds, shape, recipe, tmp_path / "stopped", 2)
    expected = ["memory-s0"] * 4 + ["base-small-s0"] * 6 + ["base-s1"] * 6  # memory was stopped behind step 3 of 6
    assert steps == expected
    assert again.rows == whole.rows
    assert [run["bits_per_byte"] for run in again.extra["runs"]] == [
        run["bits_per_byte"] for run in whole.extra["runs"]
    ]
    steps.clear()
    third = compare.run(seeds, shape, recipe, tmp_path / "stopped", 2)
    assert (steps, third.rows) == ([], whole.rows)
    with pytest.raises(TrainError, match="another recipe"):
        compare.run(seeds, shape, replace(recipe, steps=7), tmp_path / "stopped", 2)
    (tmp_path / "stopped" / "base-s0" / "recipe.json").write_text('{"shape": {}}')  # another version's
    with pytest.raises(TrainError, match="another recipe"):
        compare.run(seeds, shape, recipe, tmp_path / "stopped", 2)
    (tmp_path / "stopped" / "base-s0" / "figures.json").unlink()
    with pytest.raises(TrainError, match="another recipe"):
        compare.run(seeds, shape, replace(recipe, steps=7), tmp_path / "stopped", 2)


def test_the_report_holds_what_training_left(tmp_path: Path, shape: Shape, recipe: Recipe) -> None:
    study = compare.run({"memory": 2, "base": 1}, shape, recipe, tmp_path)
    assert [row["variant"] for row in study.rows] == ["base", "memory"]
    base, memory = study.rows
    figures = [json.loads((tmp_path / f"memory-s{seed}" / "figures.json").read_text()) for seed in (0, 1)]
    bits = [f["held_out"]["bits_per_byte"] for f in figures]
    assert (memory["bits_per_byte"], memory["spread"]) == (np.mean(bits), max(bits) - min(bits))
    assert memory["spread"] > 0
    assert memory["bits_per_byte_zeroed"] == np.mean([f["held_out_memory_zeroed"]["bits_per_byte"] for f in figures])
    assert memory["perplexity"] == np.mean([math.exp(f["held_out"]["nats_per_token"]) for f in figures])
    assert (base["spread"], base["bits_per_byte_zeroed"]) == (None, None)
    assert base["total"] == base["active"] > memory["active"]
    assert study.extra["runs"][0]["curve"][-1][0] == recipe.steps * recipe.batch * recipe.length
    written = write(study, tmp_path, lambda figure: compare.draw(study, figure))
    assert [path.name for path in written] == ["compare.json", "compare.md", "compare.png"]
    assert json.loads(written[0].read_text())["rows"] == study.rows


def test_further_tasks_are_measured_for_each_run(tmp_path: Path, shape: Shape, recipe: Recipe, blimp_zip: Path) -> None:
    tasks = Tasks((Path(str(recipe.held_out)),), length=24, blimp=blimp_zip)
    study = compare.run({"memory": 2}, shape, recipe, tmp_path, tasks=tasks)
    scores = [tasks.read(load(tmp_path / f"memory-s{seed}")).score().columns for seed in (0, 1)]
    assert scores[0].keys() >= {"ppl unseen", "blimp recall", "blimp structure", "blimp all"}
    assert study.facts["blimp_groups"]["binding"]["group"] == "structure"
    for name in scores[0]:
        assert study.rows[0][name] == np.mean([score[name] for score in scores])


def test_without_a_tokenizer_one_is_trained_for_all_runs(tmp_path: Path, recipe: Recipe) -> None:
    own = replace(recipe, tokenizer=None, steps=1)
    first = compare.run({"base": 1, "memory": 1}, replace(SHAPE, vocab_size=280), own, tmp_path)
    files = [tmp_path / name / "tokenizer.json" for name in (".", "base-s0", "memory-s0")]
    assert len({Tokenizer.from_file(str(path)).to_str() for path in files}) == 1
    assert Tokenizer.from_file(str(files[0])).get_vocab_size() == 280
    assert compare.run({"base": 1, "memory": 1}, replace(SHAPE, vocab_size=280), own, tmp_path).rows == first.rows


def test_the_commands_defaults_are_a_recipe_for_two_cores(tmp_path: Path) -> None:
    """1.6M parameters without embeddings and 10.5M tokens, the paper's recipe for the rest."""
    argv = ["--data", "a.txt", "--held-out", "b.txt", "--tokenizer", "t.json", "--out", str(tmp_path)]
    settings = StudyCompareSettings.load(argv, "tolserve study compare")
    recipe = compare.recipe_of(settings.model_dump(mode="json"))
    assert recipe.batch * recipe.length * recipe.steps == 10_485_760
    assert (recipe.weight_decay, recipe.beta1, recipe.beta2, recipe.z_loss) == (0.1, 0.9, 0.95, 1e-6)
    assert (recipe.data, recipe.held_out, recipe.tokenizer) == (("a.txt",), "b.txt", "t.json")
    assert (recipe.accumulate, recipe.autocast) == (1, "off")
    assert compare.seeds_of(settings.variants).keys() == set(PAPER_ORDER)
    assert planned(compare.seeds_of(settings.variants))[:2] == [("base", 0), ("memory", 0)]


def test_the_command_trains_and_tells_the_order(
    tmp_path: Path, recipe: Recipe, shape: Shape, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--data", recipe.data[0], "--held-out", str(recipe.held_out), "--tokenizer", str(recipe.tokenizer)]
    sizes = {"hidden-size": 16, "num-hidden-layers": 1, "num-attention-heads": 2, "vocab-size": shape.vocab_size}
    rates = {"batch": 2, "length": 16, "steps": 2, "warmup": 1, "threads": 1}
    options = [word for name, value in (sizes | rates).items() for word in (f"--{name}", str(value))]
    argv = ["study", "compare", *texts, *options, "--out", str(tmp_path), "--variants", "base:2,memory"]
    assert main([*argv, "--json"]) == 0
    assert [row["seeds"] for row in json.loads(capsys.readouterr().out)["rows"]] == [2, 1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base-s0", "base-s1", "memory-s0"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "base before memory: by" in printed
    assert "over seeds (t, 1 degrees of freedom)" in printed


def test_several_processes_train_and_one_reports(tmp_path: Path, recipe: Recipe, shape: Shape) -> None:
    texts = {"data": recipe.data[0], "held-out": recipe.held_out, "tokenizer": recipe.tokenizer, "out": tmp_path}
    sizes = {"hidden-size": 16, "num-hidden-layers": 1, "num-attention-heads": 2, "vocab-size": shape.vocab_size}
    how = {"batch": 4, "accumulate": 2, "autocast": "bf16", "device": "cpu", "length": 16, "steps": 2, "warmup": 1}
    named = texts | sizes | how | {"variants": "base,memory", "threads": 1}
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tolserve"]
    argv += ["study", "compare", "--json", *(word for key, value in named.items() for word in (f"--{key}", str(value)))]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "server"), str(root / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    study = json.loads(done.stdout)  # of one process, and nothing else
    assert [row["variant"] for row in study["rows"]] == ["base", "memory"]
    assert (study["facts"]["recipe"]["accumulate"], study["facts"]["recipe"]["autocast"]) == (2, "bf16")
    kept = json.loads((tmp_path / "memory-s0" / "recipe.json").read_text())["recipe"]
    assert (kept["accumulate"], kept["autocast"]) == (2, "bf16")


def test_a_recipe_that_lacks_later_fields_still_matches(tmp_path: Path, recipe: Recipe, shape: Shape) -> None:
    study = compare.run({"base": 1}, shape, recipe, tmp_path)
    path = tmp_path / "base-s0" / "recipe.json"
    written = json.loads(path.read_text())
    for name in ("accumulate", "autocast", "compile", "init_from", "freeze", "distil"):
        del written["recipe"][name]
    path.write_text(json.dumps(written))
    assert compare.run({"base": 1}, shape, recipe, tmp_path).rows == study.rows
    with pytest.raises(TrainError, match="another recipe"):
        compare.run({"base": 1}, shape, replace(recipe, accumulate=2), tmp_path)


@pytest.mark.parametrize("variants", [["flex-4"], ["base:0"], ["base:x"], ["base:"], ["base", "base:2"]])
def test_variants_that_are_none_are_refused(variants: list[str]) -> None:
    with pytest.raises(StudyError, match="NAME:SEEDS"):
        compare.seeds_of(variants)
    assert compare.seeds_of(["base:2", "flex-1"]) == {"base": 2, "flex-1": 1}


def runs_of(bits: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"variant": name, "bits_per_byte": value} for name, of in bits.items() for value in of]


def test_the_papers_order_is_told_with_its_spread() -> None:
    """Deviations sqrt(2)/100 and 0 over 2 + 2 seeds pool to 0.01, of 2 degrees of freedom, whose t is 4.303; a single
    against two is uncertain by 0.01 sqrt(1.5) of them."""
    found = paper_order(runs_of({SMALL: [1.41], "memory": [1.40, 1.42], "base": [1.3, 1.3], "flex-1": [1.39]}))
    assert [(pair["better"], pair["worse"]) for pair in found] == [
        ("base", "flex-1"),
        ("flex-1", "memory"),
        ("memory", SMALL),
    ]
    assert [round(pair["ahead"], 6) for pair in found] == [0.09, 0.02, 0.0]
    assert [pair["as_the_paper"] for pair in found][:2] == [True, True]
    assert [pair["clear"] for pair in found] == [True, False, False]
    assert [pair["freedom"] for pair in found] == [2, 2, 2]
    assert [pair["margin"] for pair in found] == pytest.approx([4.302653 * 0.01 * 1.5**0.5] * 3, rel=1e-6)
    near = paper_order(runs_of({"memory": [1.40, 1.42], "base": [1.3, 1.3], "flex-1": [1.35]}))
    assert [(round(pair["ahead"], 3), pair["clear"]) for pair in near] == [(0.05, False), (0.06, True)]
    turned = paper_order(runs_of({"base": [1.4, 1.41], "memory": [1.2]}))
    assert [(pair["as_the_paper"], pair["clear"]) for pair in turned] == [(False, True)]
    (alone,) = paper_order(runs_of({"base": [1.4], "memory": [1.2]}))
    assert (alone["clear"], alone["margin"]) == (None, None)


def test_held_out_text_is_needed(tmp_path: Path, shape: Shape, recipe: Recipe) -> None:
    with pytest.raises(StudyError, match="--held-out"):
        compare.run({"base": 1}, shape, replace(recipe, held_out=None), tmp_path)
    assert not list(tmp_path.iterdir())
