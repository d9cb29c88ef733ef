"""`tolserve pack`: what each way of making a pack puts into it, against the obvious computation."""

import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from packs import target_of
from tiny import random_model, tiny_config
from tolserve.api.tokenizer import ModelFiles
from tolserve.cli import main
from tolserve.model.build import BuildOptions, build_table, export
from tolserve.model.checkpoint import compute_fingerprint, load_transformer, save_checkpoint
from tolserve.model.config import ModelConfig
from tolserve.model.pack import Entries, parse_pack

Run = Callable[..., tuple[dict[str, Any], Entries]]
Fails = Callable[..., str]


@pytest.fixture
def run(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*options)`: what `tolserve pack --json` printed, and what lies in the file."""

    def make(*options: str, model: Path = tiny_model_dir) -> tuple[dict[str, Any], Entries]:
        out = tmp_path / "a.safetensors"
        assert main(["pack", str(model), "--out", str(out), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out), parse_pack(out.read_bytes(), target_of(model))

    return make


@pytest.fixture
def fails(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(status, *options)`: the one line that it ends with; no file is left."""

    def make(status: int, *options: str, model: Path = tiny_model_dir, name: str = "a.safetensors") -> str:
        assert main(["pack", str(model), "--out", str(tmp_path / "out" / name), *options]) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("tolserve: ")
        assert captured.err.count("\n") == 1
        assert not [*tmp_path.glob("out/*.safetensors")]
        return captured.err

    return make


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny one's shape and other weights."""
    folder, config = tmp_path_factory.mktemp("other"), tiny_config()
    weights = {name: p.to(torch.bfloat16) for name, p in random_model(config, seed=5).named_parameters()}
    save_checkpoint(folder, config, weights, compute_fingerprint(config, weights))
    return folder


def pairs_of(entries: Entries) -> list[tuple[int, int]]:
    return [*zip(entries.tokens.tolist(), entries.layers.tolist(), strict=True)]


def live_row(model_dir: Path, token: int, layer: int, change: Callable[[Tensor], None] | None = None) -> Tensor:
    """What the layer's memory network gives, its values `down_proj` [d, K] changed before."""
    model = load_transformer(model_dir, with_memory=True, dtype=torch.float32)
    if change is not None:
        change(model.model.layers[layer].memory.down_proj.weight)
    return model.model.layers[layer].memory_row(model.model.embed_tokens.weight[token])


def test_rows_of_another_model_replace_ones_own(run: Run, other_dir: Path) -> None:
    printed, entries = run("--from", str(other_dir), "--tokens", "7,3,7", "--layers", "1,0")
    assert pairs_of(entries) == [(3, 0), (3, 1), (7, 0), (7, 1)]
    assert entries.scales.tolist() == [0.0] * 4
    assert entries.rows.dtype == torch.bfloat16
    for (token, layer), row in zip(pairs_of(entries), entries.rows, strict=True):
        torch.testing.assert_close(row, live_row(other_dir, token, layer).to(torch.bfloat16))
    assert (printed["entries"], printed["bytes"], printed["layers"]) == (4, 4 * (12 + 2 * 32), [0, 1])
    assert [token["id"] for token in printed["tokens"]] == [3, 7]
    assert other_dir.name in printed["description"]


@pytest.mark.parametrize(
    ("options", "most"),
    [
        (BuildOptions(), 0.0),
        (BuildOptions("int8", group_size=8), 0.02),
        (BuildOptions("int4", group_size=8), 0.2),
        (BuildOptions(rank=32), 0.02),
        (BuildOptions(dropped_layers=(1,)), 0.0),
    ],
)
def test_rows_may_come_from_a_table_of_any_encoding(
    run: Run, other_dir: Path, tmp_path: Path, options: BuildOptions, most: float
) -> None:
    """`most`: how far a row may be from the network's, as a share of its length, beside bf16's rounding."""
    build_table(other_dir, tmp_path / "table", options)
    _, entries = run("--from", str(tmp_path / "table"), "--tokens", "5,299")
    assert pairs_of(entries) == [(5, 0), (5, 1), (299, 0), (299, 1)]
    assert entries.scales.tolist() == [0.0] * 4
    for (token, layer), row in zip(pairs_of(entries), entries.rows.float(), strict=True):
        wanted = live_row(other_dir, token, layer) * (layer not in options.dropped_layers)
        assert (row - wanted).norm() <= (most + 0.004) * wanted.norm()


def test_a_model_directorys_own_table_is_taken_and_must_be_its_own(
    run: Run, fails: Fails, other_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    export(other_dir, tmp_path / "exported")
    _, entries = run("--from", str(tmp_path / "exported"), "--tokens", "9", "--layers", "1")
    assert entries.rows[0].equal(live_row(other_dir, 9, 1).to(torch.bfloat16))
    build_table(tiny_model_dir, tmp_path / "mine", BuildOptions())
    (tmp_path / "exported" / "tol").rename(tmp_path / "gone")
    (tmp_path / "mine").rename(tmp_path / "exported" / "tol")
    assert "other weights" in fails(1, "--from", str(tmp_path / "exported"), "--tokens", "9")


def test_rows_are_suppressed_or_scaled(run: Run) -> None:
    for options, scale, layers in (
        (("--suppress",), 0.0, [0, 1]),
        (("--scale", "0.5", "--layers", "1"), 0.5, [1]),
        (("--scale", "-2"), -2.0, [0, 1]),
    ):
        printed, entries = run("--tokens", " the,4", *options)
        assert {token["text"] for token in printed["tokens"]} >= {" the"}
        assert {token for token, _ in pairs_of(entries)} == {token["id"] for token in printed["tokens"]}
        assert sorted({layer for _, layer in pairs_of(entries)}) == layers
        assert entries.scales.tolist() == [scale] * len(pairs_of(entries)) == [scale] * 2 * len(layers)
        assert not entries.rows.any()


@pytest.mark.parametrize(("times", "value_of"), [("3", None), ("0", None), (None, "17"), ("-1.5", " the")])
@pytest.mark.parametrize("variant", ["memory", "flex"])
def test_a_cells_value_is_another(
    run: Run,
    model_dir_of: Callable[[ModelConfig], Path],
    variant: Any,
    times: str | None,
    value_of: str | None,
) -> None:
    """As if the network's matrix of values had another column."""
    model_dir = model_dir_of(tiny_config(variant))
    options = ["--layer", "1", "--cell", "13", "--tokens", "2,40,41"]
    options += ["--times", times] if times is not None else []
    options += ["--value-of", value_of] if value_of is not None else []
    printed, entries = run(*options, model=model_dir)
    assert pairs_of(entries) == [(2, 1), (40, 1), (41, 1)]
    assert entries.scales.tolist() == [1.0] * 3
    embeddings = load_transformer(model_dir, with_memory=True, dtype=torch.float32).model.embed_tokens.weight
    named = 17 if value_of == "17" else next(i for i in range(300) if label(model_dir, i) == " the")

    def change(values: Tensor) -> None:
        length = values[:, 13].norm()
        if value_of is not None:
            values[:, 13] = embeddings[named] / embeddings[named].norm() * length
        values[:, 13] *= float(times or 1)

    for (token, layer), row in zip(pairs_of(entries), entries.rows, strict=True):
        torch.testing.assert_close(live_row(model_dir, token, layer) + row, live_row(model_dir, token, layer, change))
    assert "cell 13" in printed["description"]


def label(model_dir: Path, token: int) -> str:
    return ModelFiles.load(model_dir).tokenizer.label(token)


@pytest.mark.parametrize("share", [None, "0.9", "0.2"])
def test_a_cell_finds_its_tokens(run: Run, tiny_model_dir: Path, share: str | None) -> None:
    model = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.float32)
    layer = model.model.layers[0]
    sizes = []
    for token in range(300):
        query = layer.memory_layernorm(model.model.embed_tokens.weight[token])
        gate, up = layer.memory.gate_proj.weight[20], layer.memory.up_proj.weight[20]
        sizes.append(abs(float(F.silu(gate @ query) * (up @ query))))
    wanted = [token for token in range(300) if sizes[token] >= float(share or 0.5) * max(sizes)]
    _, entries = run("--layer", "0", "--cell", "20", "--times", "2", *(["--share", share] if share else []))
    assert pairs_of(entries) == [(token, 0) for token in wanted]
    assert 0 < len(wanted) < 300


def test_a_packs_file_is_as_readable_as_any_other(run: Run, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        run("--tokens", "1", "--suppress")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_people_see_the_first_tokens(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pack", str(tiny_model_dir), "--suppress", "--out", str(tmp_path / "new" / "a.safetensors"), "--tokens"]
    assert main([*words, " the"]) == 0
    shown = capsys.readouterr().out
    assert "description: rows times 0 at layers [0, 1] for ' the'\n" in shown
    assert "entries: 2\n" in shown
    assert main([*words, ",".join(map(str, range(100))), "--description", "a hundred of them"]) == 0
    shown = capsys.readouterr().out
    assert "description: a hundred of them\n" in shown
    assert shown.count("', ") + shown.count('", ') == 20
    assert shown.endswith(", ...\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "1"], "exactly one of --from, --suppress, --scale, --cell"),
        (["--tokens", "1", "--suppress", "--scale", "2"], "exactly one of"),
        (["--suppress"], "--tokens is required"),
        (["--tokens", "300", "--suppress"], "--tokens 300: token ids are below 300"),
        (["--tokens", "9" * 5000, "--suppress"], "tokens"),
        (["--tokens", "no such token", "--suppress"], "--tokens 'no such token': the text is "),
        (["--tokens", "1,,2", "--suppress"], "--tokens '': the text is empty"),
        (["--tokens", "1", "--suppress", "--layers", "1,,0"], "--layers: must be layer numbers, such as 3,5"),
        (["--tokens", "1", "--suppress", "--layers", "2"], "--layers 2: the model's layers are 0 to 1"),
        (["--tokens", "1", "--scale", "nan"], "--scale"),
        (["--tokens", "1", "--suppress", "--times", "2"], "--times is for --cell"),
        (["--tokens", "1", "--suppress", "--share", "0.5"], "--share is for --cell"),
        (["--tokens", "1", "--suppress", "--value-of", "3"], "--value-of is for --cell"),
        (["--tokens", "1", "--suppress", "--layer", "1"], "--layer is for --cell"),
        (["--cell", "1", "--times", "2"], "give --layer"),
        (["--cell", "1", "--layer", "1", "--layers", "1", "--times", "2"], "no --layers"),
        (["--cell", "1", "--layer", "1"], "--times, --value-of or both"),
        (["--cell", "1", "--layer", "1", "--value-of", "no such token"], "--value-of 'no such token': the text is "),
        (["--cell", "1", "--layer", "1", "--times", "2", "--tokens", "1", "--share", "0.5"], "--share chooses tokens"),
        (["--tokens", "1", "--suppress", "--description", ""], "--description"),
    ],
)
def test_wrong_options_end_with_2_and_say_which(fails: Fails, options: list[str], said: str) -> None:
    assert said in fails(2, *options)


def test_what_cannot_be_made_ends_with_1_and_says_why(
    fails: Fails, model_dir_of: Callable[[ModelConfig], Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    suppress = ["--tokens", "1", "--suppress"]
    base, wide = model_dir_of(tiny_config("base")), model_dir_of(tiny_config(hidden_size=48))
    assert "is a base model" in fails(1, *suppress, model=base)
    assert "not a model directory" in fails(1, *suppress, model=tmp_path / "none")
    for name in ("a.txt", "a b.safetensors", "ü.safetensors", ".safetensors"):
        assert "NAME.safetensors" in fails(1, *suppress, name=name)
    assert "501 characters" in fails(1, *suppress, "--description", "x" * 501)
    assert "/proc/a.safetensors" in fails(1, *suppress, "--out", "/proc/a.safetensors")
    assert "no table" in fails(1, "--tokens", "1", "--from", str(tmp_path / "none"))
    assert "(300, 2, 48)" in fails(1, "--tokens", "1", "--from", str(wide))
    assert "base model" in fails(1, "--tokens", "1", "--from", str(base))
    for layer, cell in (("2", "0"), ("0", "48")):
        assert "layers 0 to 1 with cells 0 to 47" in fails(1, "--layer", layer, "--cell", cell, "--times", "2")
    export(tiny_model_dir, tmp_path / "exported")
    cell_of = ["--layer", "0", "--cell", "0", "--times", "2"]
    assert "no memory tensors" in fails(1, *cell_of, model=tmp_path / "exported")
    assert "0 for every token" in fails(2, *cell_of, model=silent(tiny_model_dir, model_dir_of))


def test_a_full_disk_is_no_bug(fails: Fails) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))
    try:
        said = fails(1, "--suppress", "--tokens", ",".join(map(str, range(300))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a.safetensors cannot be written" in said


def silent(model_dir: Path, model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    """A model whose first layer's keys are all zero."""
    folder, config = model_dir_of(tiny_config()), ModelConfig.load(model_dir)
    weights = load_transformer(folder, with_memory=True, dtype=torch.bfloat16).state_dict()
    weights["model.layers.0.memory.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.bfloat16)
    save_checkpoint(folder, config, weights, compute_fingerprint(config, weights))
    return folder
