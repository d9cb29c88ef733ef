"""Runs that start from a LLaMA checkpoint: what is taken over, what trains, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tiny import tiny_config
from tiny_run import recipe_of, train, write_texts
from tolserve.cli import main
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ConfigError, FfnVariant, ModelConfig
from tolserve.model.presets import SIZES, preset
from tolserve.model.transformer import Transformer
from tolserve.settings import TrainSettings
from tolserve.train.loop import Run
from tolserve.train.objective import divergence
from tolserve.train.recipe import TrainError
from tolserve.train.start import shape_from

FFN = ("mlp", "post_attention_layernorm", "memory", "memory_layernorm", "compute", "compute_layernorm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), tokenizer)


@pytest.fixture(scope="module")
def llama(model_dir_of: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint as others write it: model_type llama, two files of weights are one here, an untied head."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(model_dir_of(tiny_config("base", tie_word_embeddings=False, vocab_size=310)), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw = {key: raw[key] for key in raw if key not in ("ffn_variant", "flex_beta", "architectures")}
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "llama", "eos_token_id": 1}))
    return folder


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def start(folder: Path, out: Path, llama: Path, variant: FfnVariant, beta: int = 0, **changes: Any) -> Run:
    recipe = recipe_of(folder, tokenizer=None, init_from=str(llama), **changes)
    return Run(out, shape_from(llama, variant, beta, None), recipe)


@pytest.mark.parametrize(("variant", "beta"), [("memory", 0), ("flex", 1), ("base", 0)])
def test_all_but_the_ffns_is_taken_over(
    folder: Path, tmp_path: Path, llama: Path, variant: FfnVariant, beta: int
) -> None:
    run = start(folder, tmp_path, llama, variant, beta)
    given = weights_of(load_transformer(llama, with_memory=True, dtype=torch.float32))
    fresh = Transformer(run.config, with_memory=True)
    fresh.initialise(run.recipe.seed)
    anew = weights_of(fresh)
    for name, found in weights_of(run.model).items():
        own = (variant != "base" and name.split(".")[-2] in FFN) or ".memory." in name or ".compute." in name
        assert torch.equal(found, anew[name] if own else given[name]), name
    assert (run.config.eos_token_id, run.config.vocab_size) == (1, 310)  # the checkpoint's, not the tokenizer's


@pytest.mark.parametrize(("variant", "beta"), [("memory", 0), ("flex", 2)])
def test_a_model_that_was_started_trains_and_is_whole(
    folder: Path, tmp_path: Path, llama: Path, variant: FfnVariant, beta: int
) -> None:
    run = start(folder, tmp_path, llama, variant, beta, steps=60)
    before = start(folder, tmp_path / "before", llama, variant, beta, steps=0).finish()
    figures = train(run, save_every=60).finish()
    assert figures["held_out"]["nats_per_token"] < 0.8 * before["held_out"]["nats_per_token"]
    assert load_transformer(tmp_path, with_memory=True, dtype=torch.float32).config == run.config
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (llama / name).read_bytes()


@pytest.mark.parametrize("distil", [False, True])
def test_frozen_weights_stay_and_a_killed_run_goes_on(folder: Path, tmp_path: Path, llama: Path, distil: bool) -> None:
    options = {"freeze": True, "distil": distil}
    begun = weights_of(start(folder, tmp_path / "begun", llama, "memory", **options).model)
    whole = train(start(folder, tmp_path / "whole", llama, "memory", **options))
    for name, parameter in weights_of(whole.model).items():
        assert torch.equal(parameter, begun[name]) == ("memory" not in name), name
    killed = start(folder, tmp_path / "killed", llama, "memory", **options)
    batches = killed.sequences.batches(2, 0)
    for _ in range(4):
        killed.losses.append(killed.train_step(next(batches)))
    killed.losses[:2] = []
    killed.save_state()
    resumed = train(start(folder, tmp_path / "killed", llama, "memory", **options))
    assert resumed.step == whole.step
    assert all(torch.equal(p, weights_of(resumed.model)[name]) for name, p in weights_of(whole.model).items())


def test_distilling_comes_nearer_to_the_given_model(folder: Path, tmp_path: Path, llama: Path) -> None:
    teacher = load_transformer(llama, with_memory=True, dtype=torch.float32)
    tokens = torch.randint(300, (4, 24))
    run = start(folder, tmp_path, llama, "memory", distil=True, steps=40)
    before = divergence(run.model(tokens), teacher(tokens)).item()
    train(run, save_every=40)
    assert divergence(run.model(tokens), teacher(tokens)).item() < 0.9 * before


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path, llama: Path) -> None:
    shape = shape_from(llama, "memory", 0, None)
    with pytest.raises(TrainError, match="--tokenizer"):
        Run(tmp_path / "a", shape, recipe_of(folder, init_from=str(llama)))
    with pytest.raises(TrainError, match="--length 129"):
        start(folder, tmp_path / "b", llama, "memory", length=129)
    with pytest.raises(TrainError, match="nothing to train"):
        start(folder, tmp_path / "c", llama, "base", freeze=True)
    for name in ("freeze", "distil"):
        with pytest.raises(TrainError, match=f"--{name} needs --init-from"):
            recipe_of(folder, **{name: True})
    other = tmp_path / "llama"
    shutil.copytree(llama, other)
    raw = json.loads((llama / "config.json").read_text())
    for change, message in (
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"model_type": "mistral"}, "model_type"),
    ):
        (other / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ConfigError, match=message):
            shape_from(other, "memory", 0, None)
    for change, message in (
        ({"vocab_size": 299}, "has 300 tokens"),
        ({"bos_token_id": None, "eos_token_id": None}, "to separate documents by"),
    ):
        (other / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(TrainError, match=message):
            start(folder, tmp_path / message, other, "memory")
    (other / "config.json").write_text(json.dumps(raw))
    (other / "tokenizer.json").unlink()
    with pytest.raises(TrainError, match="no tokenizer"):
        start(folder, tmp_path / "d", other, "memory")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("beta", [1, 2, 3])
def test_flex_splits_the_checkpoints_parameters(tmp_path: Path, size: str, beta: int) -> None:
    """FFN-C and FFN-M together have as many as the checkpoint's FFN, but for less than one of K's rows."""
    base = preset(size, "base")
    base.save(tmp_path)
    flex = shape_from(tmp_path, "flex", beta, None)
    d = base.hidden_size
    missing = 3 * d * base.intermediate_size - 3 * d * flex.intermediate_size - beta * d * d
    assert abs(missing) < 3 * d
    assert flex.intermediate_size == pytest.approx(preset(size, f"flex-{beta}").intermediate_size, rel=0.002)
    flex.save(tmp_path)
    assert shape_from(tmp_path, "base", 0, None).intermediate_size == pytest.approx(base.intermediate_size, abs=1)
    assert shape_from(tmp_path, "memory", 0, 77).intermediate_size == 77


def test_a_shape_without_room_for_memory_is_refused(tmp_path: Path) -> None:
    tiny_config("base", intermediate_size=20).save(tmp_path)
    with pytest.raises(TrainError, match="leaves no parameters"):
        shape_from(tmp_path, "flex", 3, None)


def test_from_the_command_line(folder: Path, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--data", str(folder / "first.txt"), "--init-from", str(llama), "--length", "24"]
    argv += ["--steps", "2", "--warmup", "1", "--freeze", "--distil", "--json"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["training_tokens"] == 2 * 4 * 24
    assert main([*argv, "--out", str(tmp_path / "other"), "--hidden-size", "64"]) == 2
    assert "--hidden-size is 64, but --init-from's is 32" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "run"), "--no-distil"]) == 1
    assert "another recipe" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "other"), "--preset", "1B"]) == 2
    assert "--preset" in capsys.readouterr().err


def test_a_preset_brings_the_papers_recipe(tmp_path: Path) -> None:
    """Where an option is not given, on the command line or in a file."""
    names = ("length", "warmup", "peak_lr", "min_lr", "z_loss")
    (tmp_path / "options.toml").write_text('preset = "1B"\nwarmup = 7\n')
    for argv, expected in (
        ([], (1024, 200, 3e-3, 1.5e-4, 1e-6)),
        (["--preset", "250M"], (2048, 5000, 1e-4, 1e-5, 1e-6)),
        (["--preset", "250M", "--length", "1024", "--peak-lr", "3e-3"], (1024, 5000, 3e-3, 1e-5, 1e-6)),
        (["--config", str(tmp_path / "options.toml"), "--min-lr", "0"], (2048, 7, 1e-4, 0.0, 1e-6)),
    ):
        settings = TrainSettings.load([*argv, "--data", "a.txt", "--out", "b"], "tolserve train")
        assert tuple(getattr(settings, name) for name in names) == expected
