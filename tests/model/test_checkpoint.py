"""Checkpoints: what is written comes back, and anything else is refused by name."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import random_model, tiny_config
from tolserve.model.checkpoint import (
    FINGERPRINT_KEY,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    compute_fingerprint,
    is_memory_tensor,
    load_transformer,
    read_fingerprint,
    save_checkpoint,
    save_tensors,
)
from tolserve.model.config import ConfigError, ModelConfig

ROW = "model.layers.1.memory.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def rewrite(model_dir: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(model_dir / WEIGHTS)
    change(tensors)
    save_file(tensors, model_dir / WEIGHTS)


def load(model_dir: Path, *, with_memory: bool = True) -> object:
    return load_transformer(model_dir, with_memory=with_memory, dtype=torch.float32)


@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_comes_back(tmp_path: Path, variant: str, tied: bool, dtype: torch.dtype) -> None:
    model = random_model(tiny_config(variant, tie_word_embeddings=tied))
    saved = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    save_checkpoint(tmp_path / "new" / "model", model.config, saved, fingerprint=None)
    read = load_transformer(tmp_path / "new" / "model", with_memory=True, dtype=torch.float32)
    assert read.config == model.config
    assert {name for name, _ in read.named_parameters()} == set(saved)
    for name, parameter in read.named_parameters():
        assert torch.equal(parameter, saved[name].float()), name
        assert not parameter.requires_grad
    assert not [path for path in (tmp_path / "new" / "model").iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_who_may_read_a_checkpoint_follows_the_umask(tmp_path: Path, umask: int) -> None:
    """A server often runs as another user than the training."""
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_base_checkpoint_has_llamas_tensor_names() -> None:
    layer = "model.layers.1."
    names = {name for name, _ in random_model(tiny_config("base", tie_word_embeddings=False)).named_parameters()}
    assert {name for name in names if not name.startswith("model.layers.0.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"{layer}self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        f"{layer}input_layernorm.weight",
        f"{layer}post_attention_layernorm.weight",
    }


def test_weights_do_not_change_with_the_file(model_dir: Path) -> None:
    model = load_transformer(model_dir, with_memory=True, dtype=torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with (model_dir / WEIGHTS).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_missing_tensor_is_named(model_dir: Path, with_memory: bool) -> None:
    rewrite(model_dir, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(CheckpointError, match=QUERY):
        load(model_dir, with_memory=with_memory)


@pytest.mark.parametrize("with_memory", [True, False])
def test_an_extra_tensor_is_named(model_dir: Path, with_memory: bool) -> None:
    rewrite(model_dir, lambda tensors: tensors.update({"model.layers.2.self_attn.q_proj.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight"):
        load(model_dir, with_memory=with_memory)


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_misshapen_tensor_is_named(model_dir: Path, with_memory: bool) -> None:
    rewrite(model_dir, lambda tensors: tensors.update({QUERY: tensors[QUERY][:, :-1].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{QUERY}.*\[32, 31\].*\[32, 32\]"):
        load(model_dir, with_memory=with_memory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_a_tensor_of_another_type_is_named(model_dir: Path, dtype: torch.dtype) -> None:
    rewrite(model_dir, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(dtype)}))
    with pytest.raises(CheckpointError, match=QUERY):
        load(model_dir)


def test_the_serving_form_needs_no_memory_tensors_and_reads_none(model_dir: Path) -> None:
    whole = load_transformer(model_dir, with_memory=False, dtype=torch.float32)
    rewrite(model_dir, lambda tensors: tensors.update({ROW: torch.zeros(3, dtype=torch.int32)}))  # unreadable if read
    beside = load_transformer(model_dir, with_memory=False, dtype=torch.float32)
    rewrite(model_dir, lambda tensors: [tensors.pop(name) for name in list(tensors) if is_memory_tensor(name)])
    without = load_transformer(model_dir, with_memory=False, dtype=torch.float32)
    assert not Checkpoint(model_dir).has_memory_weights()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, beside.get_parameter(name)), name
        assert torch.equal(parameter, without.get_parameter(name)), name
    with pytest.raises(CheckpointError, match="memory"):
        load(model_dir, with_memory=True)


def test_memory_tensors_in_a_base_checkpoint_are_extra(model_dir_of: Callable[[ModelConfig], Path]) -> None:
    model_dir = model_dir_of(tiny_config("base"))
    rewrite(model_dir, lambda tensors: tensors.update({ROW: torch.zeros(48, 32)}))
    with pytest.raises(CheckpointError, match=ROW):
        load(model_dir, with_memory=False)


def test_a_pickled_checkpoint_is_not_read(model_dir: Path) -> None:
    tensors = load_file(model_dir / WEIGHTS)
    (model_dir / WEIGHTS).unlink()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(model_dir)
    shutil.copy(model_dir / "pytorch_model.bin", model_dir / WEIGHTS)
    with pytest.raises(CheckpointError, match="safetensors"):
        load(model_dir)
    index = {"weight_map": dict.fromkeys(tensors, "pytorch_model.bin")}
    (model_dir / (WEIGHTS + ".index.json")).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="pytorch_model.bin"):
        load(model_dir)


@pytest.mark.parametrize("damage", ["empty", "short", "long", "header"])
def test_a_damaged_file_is_refused(model_dir: Path, damage: str) -> None:
    content = (model_dir / WEIGHTS).read_bytes()
    damaged = {
        "empty": b"",
        "short": content[:-1],
        "long": content + b"\0",
        "header": (1 << 40).to_bytes(8, "little") + content[8:],
    }
    (model_dir / WEIGHTS).write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(model_dir)


def split_in_two(model_dir: Path) -> dict[str, str]:
    """The same checkpoint as two files and an index; returns the weight map."""
    tensors = load_file(model_dir / WEIGHTS)
    (model_dir / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, model_dir / file)
    return {name: file for file, members in halves.items() for name in members}


def write_index(model_dir: Path, weight_map: object) -> None:
    (model_dir / (WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": weight_map}))


def test_a_checkpoint_in_several_files_is_the_same(model_dir: Path, tiny_model_dir: Path) -> None:
    write_index(model_dir, split_in_two(model_dir))
    whole = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.float32)
    parts = load_transformer(model_dir, with_memory=True, dtype=torch.float32)
    assert all(torch.equal(parameter, parts.get_parameter(name)) for name, parameter in whole.named_parameters())
    assert read_fingerprint(model_dir) == read_fingerprint(tiny_model_dir)


@pytest.mark.parametrize("escape", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "", 7])
def test_an_index_that_points_elsewhere_is_refused(model_dir: Path, escape: object) -> None:
    weight_map = split_in_two(model_dir)
    shutil.copy(model_dir / "model-1.safetensors", model_dir.parent / WEIGHTS)
    write_index(
        model_dir, {name: escape if file == "model-1.safetensors" else file for name, file in weight_map.items()}
    )
    with pytest.raises(CheckpointError, match=r"index\.json names"):
        load(model_dir)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": null}'])
def test_a_broken_index_is_refused(model_dir: Path, content: str) -> None:
    (model_dir / (WEIGHTS + ".index.json")).write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(model_dir)


def test_a_tensor_in_two_files_is_refused(model_dir: Path) -> None:
    tensors = load_file(model_dir / WEIGHTS)
    save_file({QUERY: tensors[QUERY]}, model_dir / "more.safetensors")
    write_index(model_dir, dict.fromkeys(tensors, WEIGHTS) | {QUERY: "more.safetensors"})
    with pytest.raises(CheckpointError, match=f"{QUERY}.*more than one"):
        load(model_dir)


def test_a_file_that_the_index_names_but_that_is_not_there_is_named(model_dir: Path) -> None:
    write_index(model_dir, split_in_two(model_dir))
    (model_dir / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-2"):
        load(model_dir)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json"):
        load(tmp_path)
    tiny_config().save(tmp_path)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(tmp_path)


@pytest.mark.parametrize("variant", ["memory", "flex"])
def test_the_fingerprint_covers_what_a_table_is_computed_from(variant: str) -> None:
    config = tiny_config(variant, tie_word_embeddings=False)
    weights = {name: parameter.to(torch.bfloat16) for name, parameter in random_model(config).named_parameters()}
    fingerprint = compute_fingerprint(config, weights)
    assert len(fingerprint) == 32
    for name, tensor in weights.items():
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        relevant = name == EMBEDDING or is_memory_tensor(name)
        assert (compute_fingerprint(config, weights | {name: changed}) != fingerprint) == relevant, name
    reordered = dict(reversed(weights.items()))
    assert compute_fingerprint(config, reordered) == fingerprint


def test_the_fingerprint_covers_precision_and_epsilon() -> None:
    config = tiny_config()
    weights = dict(random_model(config).named_parameters())
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    other = tiny_config(rms_norm_eps=1e-6)
    found = {
        compute_fingerprint(config, weights),
        compute_fingerprint(config, halved),
        compute_fingerprint(other, halved),
    }
    assert len(found) == 3
    swapped = halved | {ROW: halved[ROW.replace(".1.", ".0.")], ROW.replace(".1.", ".0."): halved[ROW]}
    assert compute_fingerprint(config, swapped) not in found


def test_a_stored_fingerprint_is_believed_and_a_missing_one_computed(model_dir: Path) -> None:
    fingerprint = read_fingerprint(model_dir)
    assert Checkpoint(model_dir).metadata[FINGERPRINT_KEY] == fingerprint
    rewrite(model_dir, lambda tensors: None)  # drops the metadata
    assert FINGERPRINT_KEY not in Checkpoint(model_dir).metadata
    assert read_fingerprint(model_dir) == fingerprint
    rewrite(model_dir, lambda tensors: [tensors.pop(name) for name in list(tensors) if is_memory_tensor(name)])
    with pytest.raises(CheckpointError, match="memory tensors"):
        read_fingerprint(model_dir)


def test_nothing_in_a_model_folder_is_unpickled(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> object:
        raise RuntimeError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load(model_dir)
