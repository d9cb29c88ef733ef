"""The training loop: its arithmetic against references, exact resume, and that it learns."""

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from tiny import TEXT, tiny_config
from tiny_run import STEPS, recipe_of, train, write_texts
from tolserve.model.checkpoint import load_transformer, read_fingerprint
from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.train.data import DataError, read_documents
from tolserve.train.loop import Run, make_optimizer
from tolserve.train.objective import loss_terms
from tolserve.train.recipe import TrainError
from tolserve.train.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_texts(tmp_path_factory.mktemp("text"), tokenizer)


def train_until_killed(run: Run, step: int, save_every: int) -> None:
    """Train, and be stopped by an exception when `step` steps are done, as a killed process is."""

    class KilledError(Exception):
        pass

    whole_step = run.train_step

    def train_step(batch: Any) -> float:
        if run.step == step:
            raise KilledError
        return whole_step(batch)

    run.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        train(run, save_every)


def weights(run: Run) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in run.model.named_parameters()}


@given(
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
    peak=st.floats(1e-5, 1e-2),
    share=st.floats(0, 1),
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(warmup: int, steps: int, peak: float, share: float) -> None:
    recipe = recipe_of(Path(), steps=steps, warmup=warmup, peak_lr=peak, min_lr=peak * share)
    rates = [recipe.learning_rate(step) for step in range(steps)]
    for step, rate in enumerate(rates):
        if step < warmup:
            assert rate == pytest.approx(peak * (step + 1) / warmup)
        else:
            turn = math.pi * (step - warmup) / (steps - warmup)
            assert rate == pytest.approx(peak * share + peak * (1 - share) * (1 + math.cos(turn)) / 2)
    if warmup < steps:
        assert rates[warmup] == pytest.approx(peak)
        assert recipe.learning_rate(steps) == pytest.approx(peak * share)
        assert recipe.learning_rate(10 * steps + warmup) == pytest.approx(peak * share)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), length=st.integers(1, 5), z_loss=st.sampled_from([0.0, 1e-6, 0.1]), seed=st.integers(0, 99)
)
def test_loss_terms_equal_a_slow_reference(batch: int, length: int, z_loss: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, length, 11, generator=generator)
    targets = torch.randint(11, (batch, length), generator=generator)
    cross_entropy = penalty = 0.0
    for row in range(batch):
        for position in range(length):
            scores = logits[row, position].double().tolist()
            normaliser = math.log(sum(math.exp(score) for score in scores))
            cross_entropy += normaliser - scores[int(targets[row, position])]
            penalty += normaliser**2
    count = batch * length
    found = loss_terms(logits, targets, z_loss)
    assert found[0].item() == pytest.approx(cross_entropy / count, rel=1e-4, abs=1e-6)
    assert found[1].item() == pytest.approx(z_loss * penalty / count, rel=1e-4)


@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
def test_matrices_decay_and_norms_do_not(variant: str) -> None:
    model = Transformer(tiny_config(variant, tie_word_embeddings=False), with_memory=True)
    recipe = recipe_of(Path())
    decay = {
        id(parameter): group["weight_decay"]
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }
    expected = {name: 0.0 if name.endswith("norm.weight") else 0.1 for name, _ in model.named_parameters()}
    assert {name: decay[id(parameter)] for name, parameter in model.named_parameters()} == expected


def test_a_step_is_clipped_adamw_on_the_objective(folder: Path, tmp_path: Path) -> None:
    """Two steps by hand in float64, from the gradient of loss_terms."""
    recipe = recipe_of(folder, clip=0.05, z_loss=0.1)
    run = Run(tmp_path / "run", tiny_config(), recipe)
    by_hand = {name: p.detach().double().clone() for name, p in run.model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in by_hand.items()}
    square = {name: torch.zeros_like(p) for name, p in by_hand.items()}
    batch = np.random.default_rng(0).integers(300, size=(2, 25)).astype(np.int32)
    for step in range(2):
        sample = torch.from_numpy(batch).long()
        objective = sum(loss_terms(run.model(sample[:, :-1]), sample[:, 1:], recipe.z_loss))
        gradients = torch.autograd.grad(objective, list(run.model.parameters()))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        assert norm > recipe.clip
        rate = recipe.learning_rate(step)
        for (name, parameter), gradient in zip(by_hand.items(), gradients, strict=True):
            clipped = gradient.double() * recipe.clip / norm
            mean[name] = 0.9 * mean[name] + 0.1 * clipped
            square[name] = 0.95 * square[name] + 0.05 * clipped.square()
            corrected = mean[name] / (1 - 0.9 ** (step + 1))
            spread = (square[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            by_hand[name] = parameter * (1 - rate * decay) - rate * corrected / spread
        run.train_step(batch)
        assert run.step == step + 1
        for name, parameter in run.model.named_parameters():
            # Where a gradient is nearly zero, AdamW's quotient magnifies its rounding: hence an absolute bound,
            # a hundredth of a step.
            assert torch.allclose(parameter.double(), by_hand[name], rtol=1e-4, atol=rate / 100), name


RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base", {}),
    "memory": ("memory", {}),
    "flex": ("flex", {}),
    "micro-batches": ("memory", {"accumulate": 2}),
    "autocast": ("memory", {"autocast": "bf16"}),
    "own tokenizer": ("memory", {"tokenizer": None}),
}


def loss_rows(out: Path) -> list[list[str]]:
    """loss.csv without the seconds."""
    return [row.split(",")[:-1] for row in (out / "loss.csv").read_text().splitlines()]


@pytest.mark.parametrize("killed_at", [1, 4, 7])
@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_run_goes_on_to_the_same_weights(folder: Path, tmp_path: Path, name: str, killed_at: int) -> None:
    """Saving every third step and logging every second: what was not logged yet is resumed as well."""
    variant, changes = RESUMED[name]
    shape, recipe = tiny_config(variant), recipe_of(folder, **changes)
    whole = train(Run(tmp_path / "whole", shape, recipe))
    train_until_killed(Run(tmp_path / "killed", shape, recipe), killed_at, save_every=3)
    resumed = Run(tmp_path / "killed", shape, recipe)
    assert resumed.step == killed_at // 3 * 3
    train(resumed)
    assert resumed.step == STEPS
    for parameter_name, parameter in weights(whole).items():
        assert torch.equal(parameter, weights(resumed)[parameter_name]), parameter_name
    assert loss_rows(tmp_path / "whole") == loss_rows(tmp_path / "killed")


def test_a_run_of_an_earlier_version_goes_on(folder: Path, tmp_path: Path) -> None:
    """Its recipe.json and progress.json lack what came later, which then has its default."""
    whole = train(Run(tmp_path / "whole", tiny_config(), recipe_of(folder)))
    train_until_killed(Run(tmp_path / "old", tiny_config(), recipe_of(folder)), 6, save_every=2)
    path, progress = tmp_path / "old" / "recipe.json", tmp_path / "old" / "state" / "progress.json"
    written = json.loads(path.read_text())
    for name in ("accumulate", "autocast", "compile", "init_from", "freeze", "distil"):
        del written["recipe"][name]
    path.write_text(json.dumps(written))
    progress.write_text(json.dumps({k: v for k, v in json.loads(progress.read_text()).items() if k != "losses"}))
    with pytest.raises(TrainError, match="another recipe"):
        Run(tmp_path / "old", tiny_config(), recipe_of(folder, accumulate=2))
    resumed = Run(tmp_path / "old", tiny_config(), recipe_of(folder))
    assert resumed.step == 6
    train(resumed, save_every=2)
    assert all(torch.equal(parameter, weights(resumed)[name]) for name, parameter in weights(whole).items())


def test_a_later_versions_recipe_is_not_continued(folder: Path, tmp_path: Path) -> None:
    Run(tmp_path, tiny_config(), recipe_of(folder))
    written = json.loads((tmp_path / "recipe.json").read_text())
    written["recipe"]["unheard_of"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    with pytest.raises(TrainError, match="another recipe"):
        Run(tmp_path, tiny_config(), recipe_of(folder))


def test_micro_batches_change_no_more_than_rounding(folder: Path, tmp_path: Path) -> None:
    runs = [Run(tmp_path / str(n), tiny_config(), recipe_of(folder, batch=4, accumulate=n, steps=3)) for n in (1, 2, 4)]
    for run in runs:
        train(run)
    for run in runs[1:]:
        for name, parameter in weights(runs[0]).items():
            assert torch.allclose(parameter, weights(run)[name], atol=1e-4), name


def test_sequences_that_do_not_divide_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--batch 4 does not divide into 1 processes x --accumulate 3"):
        Run(tmp_path, tiny_config(), recipe_of(folder, batch=4, accumulate=3))


def test_autocast_rounds_and_keeps_the_weights_in_32_bits(folder: Path, tmp_path: Path) -> None:
    plain = train(Run(tmp_path / "plain", tiny_config(), recipe_of(folder)))
    rounded = train(Run(tmp_path / "rounded", tiny_config(), recipe_of(folder, autocast="bf16")))
    for name, parameter in weights(plain).items():
        assert weights(rounded)[name].dtype == torch.float32
        assert not torch.equal(parameter, weights(rounded)[name]), name
    losses = [float(loss_rows(tmp_path / name)[-1][2]) for name in ("plain", "rounded")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_compiled_run_has_nearly_the_same_losses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch traces of the model, run by its slow and plain backend: compiling kernels would take minutes."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    for name in ("plain", "compiled"):
        train(Run(tmp_path / name, tiny_config(), recipe_of(folder, compile=name == "compiled")))
    rows = [loss_rows(tmp_path / name)[1:] for name in ("plain", "compiled")]
    assert [float(row[2]) for row in rows[1]] == pytest.approx([float(row[2]) for row in rows[0]], abs=1e-3)


def test_token_files_train_as_their_text(folder: Path, tmp_path: Path) -> None:
    text = train(Run(tmp_path / "text", tiny_config(), recipe_of(folder)))
    for name, stream in zip(("a", "b"), text.sequences.streams, strict=True):
        np.save(tmp_path / f"{name}.npy", stream.astype(np.uint16))
    data = tuple(str(tmp_path / f"{name}.npy") for name in ("a", "b"))
    tokens = train(Run(tmp_path / "tokens", tiny_config(), recipe_of(folder, data=data)))
    assert all(torch.equal(parameter, weights(tokens)[name]) for name, parameter in weights(text).items())
    with pytest.raises(TrainError, match="give --tokenizer"):
        Run(tmp_path / "own", tiny_config(), recipe_of(folder, data=data, tokenizer=None))
    with pytest.raises(DataError, match="needs its bytes"):
        Run(tmp_path / "held", tiny_config(), recipe_of(folder, held_out=data[0]))


def test_the_saved_state_is_one_and_complete(folder: Path, tmp_path: Path) -> None:
    run = train(Run(tmp_path, tiny_config(), recipe_of(folder)))
    files = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert files == ["progress.json", "state-00000008.safetensors", "tokens-0.npy", "tokens-1.npy"]
    state = load_file(tmp_path / "state" / "state-00000008.safetensors")
    expected = {f"{prefix}{name}" for name in weights(run) for prefix in ("", "step:", "exp_avg:", "exp_avg_sq:")}
    assert set(state) == expected
    assert all(state[f"step:{name}"].item() == STEPS for name in weights(run))
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["step"] == STEPS


def test_a_finished_run_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = weights(train(Run(tmp_path, tiny_config(), recipe_of(folder))))
    again = train(Run(tmp_path, tiny_config(), recipe_of(folder)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in weights(again).items())


@pytest.mark.parametrize("name", ["steps", "peak_lr", "seed", "batch", "data", "held_out"])
def test_a_folder_belongs_to_one_recipe(folder: Path, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(folder)
    Run(tmp_path, tiny_config(), recipe)
    other = {"data": recipe.data[:1], "held_out": None}.get(name) if name in ("data", "held_out") else 1
    with pytest.raises(TrainError, match="another recipe"):
        Run(tmp_path, tiny_config(), replace(recipe, **{name: other}))
    with pytest.raises(TrainError, match="another recipe"):
        Run(tmp_path, tiny_config("flex"), recipe)
    assert Run(tmp_path, tiny_config(), recipe).step == 0


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_model_that_is_no_run_is_not_written_over(folder: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("somebody's")
    with pytest.raises(TrainError, match=r"that no run made; give --out a new folder"):
        Run(tmp_path, tiny_config(), recipe_of(folder))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(file, "somebody's")]


MISTAKES: dict[str, dict[str, Any]] = {
    "tokenizer": {"tokenizer": "missing.json"},
    "data": {"data": ("missing.txt",)},
    "held-out": {"held_out": "missing.txt"},
    "micro-batches": {"accumulate": 3},
    "too short": {"length": 120, "data": ("short.txt",)},
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_at_the_start_and_takes_no_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, own: bool
) -> None:
    """Also where text was tokenised already, with a tokenizer that was trained for it."""
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Only a few words.")
    Path("empty.txt").touch()
    given = {"tokenizer": None} if own else {}
    with pytest.raises((TrainError, DataError)):
        Run(tmp_path / "run", tiny_config(), recipe_of(folder, **given | MISTAKES[mistake]))
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []
    run = Run(tmp_path / "run", tiny_config(), recipe_of(folder, **given))
    with pytest.raises((TrainError, DataError)):
        Run(tmp_path / "run", tiny_config(), recipe_of(folder, **given | MISTAKES[mistake]))
    assert Run(tmp_path / "run", tiny_config(), recipe_of(folder, **given)).text.vocab_size == run.text.vocab_size


def test_a_held_out_text_without_text_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: there is no text"):
        Run(tmp_path / "run", tiny_config(), recipe_of(folder, held_out=str(tmp_path / "empty.txt")))


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_config(), recipe_of(folder, peak_lr=1e30, min_lr=1e30, warmup=0))
    with pytest.raises(TrainError, match=r"step \d: the loss is .* smaller --peak-lr"):
        train(run, save_every=1)
    state = load_file(tmp_path / "state" / f"state-{run.step:08d}.safetensors")
    assert run.step >= 1
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_the_share_of_the_matrix_rate_is_one(folder: Path, tmp_path: Path) -> None:
    figures = train(Run(tmp_path, tiny_config(), recipe_of(folder))).finish()
    flops = figures["flops_per_token"] * figures["tokens_per_second"]
    assert figures["share_of_matrix_rate"] == pytest.approx(flops / (1e9 * figures["matrix_gflops"]), abs=6e-4)
    assert figures["tokens_per_second"] * figures["training_seconds"] <= figures["training_tokens"] * 2


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="does not exist"):
        Run(tmp_path / "a", tiny_config(), recipe_of(folder, tokenizer=str(tmp_path / "none.json")))
    with pytest.raises(TrainError, match="--vocab-size is 301"):
        Run(tmp_path / "b", tiny_config(vocab_size=301), recipe_of(folder))
    (tmp_path / "none.json").write_text('{"model": ')
    with pytest.raises(TrainError, match=r"none\.json cannot be used"):
        Run(tmp_path / "a", tiny_config(), recipe_of(folder, tokenizer=str(tmp_path / "none.json")))


LLAMAS = "<|end_of_text|>"


@pytest.mark.parametrize("named", [LLAMAS, {"content": LLAMAS, "special": True}])
def test_the_separator_is_the_one_named_beside_the_tokenizer(
    folder: Path, tmp_path: Path, named: str | dict[str, Any]
) -> None:
    """As LLaMA-3.1's, which has no END_OF_TEXT."""
    foreign = Tokenizer.from_file(str(folder / "tokenizer.json")).to_str().replace(END_OF_TEXT, LLAMAS)
    Tokenizer.from_str(foreign).save(str(tmp_path / "tokenizer.json"))
    recipe = recipe_of(folder, tokenizer=str(tmp_path / "tokenizer.json"), steps=0)
    with pytest.raises(TrainError, match="endoftext.*name one that it has as eos_token in .*tokenizer_config"):
        Run(tmp_path / "run", tiny_config(), recipe)
    beside = tmp_path / "tokenizer_config.json"
    for content in ("{", "[]", '{"eos_token": {}}', '{"eos_token": "<|missing|>"}'):
        beside.write_text(content)
        with pytest.raises(TrainError, match=r"tokenizer_config\.json"):
            Run(tmp_path / "run", tiny_config(), recipe)
    beside.write_text(json.dumps({"eos_token": named}))
    run = Run(tmp_path / "run", tiny_config(), recipe)
    end = run.text.tokenizer.token_to_id(LLAMAS)
    assert run.text.separator == run.config.eos_token_id == end
    assert run.text.streams(run.state_dir)[0][0] == end
    run.finish()
    written = json.loads((tmp_path / "run" / "tokenizer_config.json").read_text())
    assert written["eos_token"] == written["bos_token"] == LLAMAS
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["eos_token_id"] == end


def test_saving_never_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="--save-every"):
        train(Run(tmp_path, tiny_config(), recipe_of(folder)), save_every=0)


def test_a_run_trains_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_config(vocab_size=280), recipe_of(folder, tokenizer=None))
    assert run.config.vocab_size == run.text.tokenizer.get_vocab_size() == 280
    assert run.config.eos_token_id == run.text.tokenizer.token_to_id(END_OF_TEXT) == 0
    again = Run(tmp_path, tiny_config(vocab_size=280), recipe_of(folder, tokenizer=None))
    assert again.text.tokenizer.to_str() == run.text.tokenizer.to_str()


@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
def test_a_short_run_learns_and_leaves_a_model_directory(folder: Path, tmp_path: Path, variant: str) -> None:
    untrained = Run(tmp_path / "untrained", tiny_config(variant), recipe_of(folder, steps=0)).finish(torch.float32)
    run = train(Run(tmp_path / "run", tiny_config(variant), recipe_of(folder, steps=60, warmup=5)), save_every=60)
    figures = run.finish()
    assert untrained["held_out"]["nats_per_token"] == pytest.approx(math.log(300), abs=0.1)
    assert figures["held_out"]["nats_per_token"] < 0.75 * math.log(300)
    assert figures["training_tokens"] == 60 * 2 * 24
    assert 0 < figures["share_of_matrix_rate"] < 1
    assert figures == json.loads((tmp_path / "run" / "figures.json").read_text())
    assert ("held_out_memory_zeroed" in figures) == (variant != "base")
    if variant != "base":
        assert figures["held_out_memory_zeroed"]["bits_per_byte"] > figures["held_out"]["bits_per_byte"]
        assert read_fingerprint(tmp_path / "run")
    model = load_transformer(tmp_path / "run", with_memory=True, dtype=torch.float32)
    assert model.config == run.config
    for name, parameter in weights(run).items():
        assert torch.equal(parameter, model.get_parameter(name)), name  # what was evaluated is what was written
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float()), name
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "run" / file).exists()


def test_held_out_bytes_are_those_of_the_text(folder: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, tiny_config(), recipe_of(folder))
    held_out = run.held_out
    assert held_out is not None
    assert held_out.text_bytes == (folder / "unseen.txt").stat().st_size
    assert [document[0] for document in held_out.documents] == [run.text.separator]
    assert [run.text.tokenizer.decode(d[1:]) for d in held_out.documents] == list(read_documents(folder / "unseen.txt"))


@given(st.text(max_size=60))
def test_the_tokenizer_encodes_any_text_back_to_itself(text: str) -> None:
    tokenizer = train_tokenizer([TEXT], 280)
    if END_OF_TEXT not in text:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_files_name_the_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_tokenizer(tokenizer, tmp_path, context=77, end=tokenizer.token_to_id(END_OF_TEXT))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == 77
    assert config["eos_token"] == config["bos_token"] == END_OF_TEXT
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 0}
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id(END_OF_TEXT) == 0


def test_the_recipe_on_disk_keeps_its_form(folder: Path, tmp_path: Path) -> None:
    """A run started by an earlier version must be resumable: these keys are its identity."""
    shape, recipe = tiny_config(), recipe_of(folder)
    Run(tmp_path, shape, recipe)
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written == {"shape": asdict(shape), "recipe": asdict(recipe) | {"data": list(recipe.data)}}
    assert ModelConfig(**written["shape"]) == shape
