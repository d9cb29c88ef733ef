"""prune: which models stand beside each other, at which counts, on which text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tiny import TEXT, tiny_config
from tolserve.model.config import ModelConfig
from tolserve.study import prune
from tolserve.study.evaluate import load, loss_of, perplexity_of, read_text
from tolserve.study.params import count_parameters
from tolserve.study.report import StudyError, write
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
    tmp_path: Path, models: dict[str, Path], text: Path
) -> None:
    base, memory, flex = (models[name] for name in ("base", "memory", "flex"))
    study = prune.run(base, [memory, flex, memory], text=text, calibration=text, length=32, sequences=4)
    active = {path.name: count_parameters(ModelConfig.load(path)).active for path in (base, memory, flex)}
    assert [(row["model"], row["active"]) for row in study.rows[:4]] == [
        (path.name, active[path.name]) for path in (base, memory, flex, memory)
    ]
    pruned = [(row["pruned"], row["active"]) for row in study.rows[4:]]
    asked = [(method, active[path.name]) for path in (memory, flex) for method in prune.METHODS]
    assert [method for method, _ in pruned] == [method for method, _ in asked]
    for (_, found), (_, wanted) in zip(pruned, asked, strict=True):
        assert found == pytest.approx(wanted, abs=7)
    assert len({row["perplexity"] for row in study.rows}) == 9  # the model that came twice has one
    whole = load(base)
    loss = loss_of(whole, read_text(whole, text, None), 32)
    assert study.rows[0]["perplexity"] == perplexity_of(loss)
    paths = write(study, tmp_path, lambda figure: prune.draw(study, figure))
    assert [path.name for path in paths] == ["prune.json", "prune.md", "prune.png"]


def test_calibration_is_the_middle_of_documents(models: dict[str, Path], text: Path, tokenizer: Tokenizer) -> None:
    found = prune.calibration_sequences(load(models["base"]), text, 3, 10)
    assert found.shape == (3, 10)
    for document, ids in enumerate(found.tolist()):
        whole = TEXT[document:] * 3
        at = whole.index(tokenizer.decode(ids), (len(whole) - 120) // 2)
        assert at == (len(whole) - 120) // 2
    assert torch.equal(found[:2], prune.calibration_sequences(load(models["base"]), text, 2, 10))
    with pytest.raises(StudyError, match="4 documents of 10 tokens; 5"):
        prune.calibration_sequences(load(models["base"]), text, 5, 10)


def test_models_that_do_not_compare_are_refused(
    tmp_path: Path, models: dict[str, Path], text: Path, model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    options = {"text": text, "calibration": text, "length": 16, "sequences": 2}
    with pytest.raises(StudyError, match="memory model"):
        prune.run(models["memory"], [models["base"]], **options)
    size = ModelConfig.load(models["base"]).vocab_size
    with pytest.raises(StudyError, match="cannot be pruned"):
        prune.run(
            models["base"], [model_dir_of(tiny_config("memory", vocab_size=size, num_hidden_layers=9))], **options
        )
    other = model_dir_of(tiny_config("memory", vocab_size=size))
    train_tokenizer(["other words"], 270).save(str(other / "tokenizer.json"))
    with pytest.raises(StudyError, match="another tokenizer"):
        prune.run(models["base"], [other], **options)
