"""prune: which models stand beside each other, at which counts, on which text."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tiny import TEXT, tiny_config
from tolserve.cli import main
from tolserve.model.config import ModelConfig
from tolserve.study import prune, sparse
from tolserve.study.evaluate import load
from tolserve.study.params import count_parameters
from tolserve.study.prune import Calibration
from tolserve.study.report import StudyError, write
from tolserve.study.sparse import METHODS
from tolserve.study.tasks import Tasks
from tolserve.train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def models(model_dir_of: Callable[[ModelConfig], Path], tokenizer: Tokenizer) -> dict[str, Path]:
    size = tokenizer.get_vocab_size()
    return {name: model_dir_of(tiny_config(name, vocab_size=size)) for name in ("base", "memory", "flex")}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[start:] * 3}) + "\n" for start in range(4)))
    return path


def test_base_is_pruned_to_the_active_parameters_of_each_model(
    tmp_path: Path, models: dict[str, Path], text: Path, blimp_zip: Path
) -> None:
    base, memory, flex = (models[name] for name in ("base", "memory", "flex"))
    tasks = Tasks((text,), length=32, blimp=blimp_zip)
    told: list[tuple[int, int]] = []
    study = prune.run([base, flex, memory], tasks, Calibration(text, 4), progress=lambda *done: told.append(done))
    active = [count_parameters(ModelConfig.load(path)).active for path in (base, flex, memory)]
    whole, pruned = study.rows[:3], study.rows[3:]
    assert [(row["model"], row["active"]) for row in whole] == [
        (path.name, count) for path, count in zip((base, flex, memory), active, strict=True)
    ]
    asked = [(method, count) for count in (active[2], active[1]) for method in METHODS]  # the smallest first
    assert [row["pruned"] for row in pruned] == [method for method, _ in asked]
    for row, (_, wanted) in zip(pruned, asked, strict=True):
        assert row["active"] == pytest.approx(wanted, abs=7)  # half a weight a matrix, and there are 14
    assert len({row["ppl text"] for row in study.rows}) == 9
    reading = tasks.read(load(base))
    assert {name: whole[0][name] for name in ("ppl text", "blimp all")}.items() <= reading.score().columns.items()
    samples = Calibration(text, 4).read(reading.studied, 32)
    magnitude = sparse.prune(
        reading.studied.model, "magnitude", sparse.share_to_keep(reading.studied.model, active[2]), samples
    )
    alone = replace(reading, studied=replace(reading.studied, model=magnitude)).score()
    assert pruned[0]["ppl text"] == alone.columns["ppl text"]
    assert told == [(done, 9) for done in range(10)]
    paths = write(study, tmp_path, lambda figure: prune.draw(study, figure))
    assert [path.name for path in paths] == ["prune.json", "prune.md", "prune.png"]


def test_calibration_is_the_middle_of_documents(models: dict[str, Path], text: Path, tokenizer: Tokenizer) -> None:
    found = Calibration(text, 3).read(load(models["base"]), 10)
    assert found.shape == (3, 10)
    for document, ids in enumerate(found.tolist()):
        whole = TEXT[document:] * 3
        at = whole.index(tokenizer.decode(ids), (len(whole) - 120) // 2)
        assert at == (len(whole) - 120) // 2
    assert torch.equal(found[:2], Calibration(text, 2).read(load(models["base"]), 10))
    with pytest.raises(StudyError, match="4 documents of 10 tokens; 5"):
        Calibration(text, 5).read(load(models["base"]), 10)


def test_models_that_do_not_compare_are_refused(
    models: dict[str, Path], text: Path, model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    base, size = models["base"], ModelConfig.load(models["base"]).vocab_size
    larger = model_dir_of(tiny_config("memory", vocab_size=size, num_hidden_layers=9))
    other = model_dir_of(tiny_config("memory", vocab_size=size))
    train_tokenizer(["other words"], 270).save(str(other / "tokenizer.json"))
    for folders, complaint in (
        ([models["memory"], base], "memory model"),
        ([base, larger], "cannot be pruned"),
        ([base, other], "another tokenizer"),
        ([base], "beside the base model"),
    ):
        with pytest.raises(StudyError, match=complaint):
            prune.run(folders, Tasks((text,), length=16), Calibration(text, 2))


def test_the_command_prunes_its_first_model(
    tmp_path: Path, models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(models["base"]), str(models["memory"])]
    options = ["--text", str(text), "--length", "16", "--calibration", str(text), "--sequences", "2"]
    argv = ["study", "prune", *folders, *options, "--methods", "wanda,magnitude", "--out", str(tmp_path), "--json"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["pruned"] for row in printed["rows"]] == ["no", "no", "wanda", "magnitude"]
    assert (tmp_path / "prune.png").exists()
    assert main([*argv, "--methods", "guess"]) == 2
    assert "--methods" in capsys.readouterr().err
