"""Tabulation: the table holds what the FFNs say, and appears whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference import Reference, weights_of
from tiny import tiny_config
from tolserve.model.build import build_table, export, stamp
from tolserve.model.checkpoint import (
    FINGERPRINT_KEY,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    is_memory_tensor,
    load_transformer,
    read_fingerprint,
)
from tolserve.model.config import ModelConfig
from tolserve.model.networks import TOKENS_PER_BATCH
from tolserve.tol.table import Table, TableError, verify

SEVERAL_BATCHES = 2 * TOKENS_PER_BATCH + 77


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_ulp(exact: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Largest rounding error of bf16, whose significand has 8 bits."""
    return np.ldexp(0.5, np.frexp(exact)[1] - 8)


@pytest.mark.parametrize("variant", ["memory", "flex"])
def test_every_row_is_the_ffns_output_rounded_once(
    model_dir_of: Callable[[ModelConfig], Path], tmp_path: Path, variant: str
) -> None:
    model_dir = model_dir_of(tiny_config(variant, vocab_size=SEVERAL_BATCHES, hidden_size=16, intermediate_size=24))
    seen: list[tuple[int, int]] = []
    manifest = build_table(model_dir, tmp_path / "tol", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, SEVERAL_BATCHES) for n in (TOKENS_PER_BATCH, 2 * TOKENS_PER_BATCH, SEVERAL_BATCHES)]
    table = Table.open(tmp_path / "tol")
    verify(table)
    assert manifest == table.manifest
    assert manifest.fingerprint == read_fingerprint(model_dir)
    assert manifest.layers == (0, 1)
    model = load_transformer(model_dir, with_memory=True, dtype=torch.float32)
    reference = Reference(model.config, weights_of(model))
    for token in range(SEVERAL_BATCHES):
        exact = np.stack([reference.row(token, layer) for layer in manifest.layers])
        stored = torch.from_numpy(table.read_record(token).copy()).view(torch.bfloat16).double().numpy()
        error = np.abs(stored.reshape(exact.shape) - exact)
        # Float32 sums of 24 products are off by a few units of 6e-8 of the largest value.
        assert (error <= half_ulp(exact) + 1e-6 * np.abs(exact).max()).all(), token


def test_a_table_is_not_replaced_unless_forced(tiny_model_dir: Path, tmp_path: Path) -> None:
    build_table(tiny_model_dir, tmp_path / "tol")
    before = files_in(tmp_path)
    with pytest.raises(TableError, match=r"tol exists.*--force"):
        build_table(tiny_model_dir, tmp_path / "tol")
    assert files_in(tmp_path) == before
    (tmp_path / "tol" / "records-00001-of-00001.safetensors").write_bytes(b"damaged")
    build_table(tiny_model_dir, tmp_path / "tol", force=True)
    assert files_in(tmp_path) == before, "building twice gives the same bytes"


def test_a_model_without_ffns_to_run_is_refused(
    model_dir_of: Callable[[ModelConfig], Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="base model"):
        build_table(model_dir_of(tiny_config("base")), tmp_path / "tol")
    export(tiny_model_dir, tmp_path / "served")
    with pytest.raises(CheckpointError, match="no memory tensors"):
        build_table(tmp_path / "served", tmp_path / "tol")
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, TableError)])
def test_a_build_that_is_cut_off_leaves_no_table_and_the_old_one(
    tiny_model_dir: Path, tmp_path: Path, error: type[BaseException], seen: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        raise error

    with pytest.raises(seen):
        build_table(tiny_model_dir, tmp_path / "tol", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == [".tol.partial"]
    build_table(tiny_model_dir, tmp_path / "tol")
    assert [path.name for path in tmp_path.iterdir()] == ["tol"]
    before = files_in(tmp_path / "tol")
    with pytest.raises(seen):
        build_table(tiny_model_dir, tmp_path / "tol", force=True, progress=stop)
    assert files_in(tmp_path / "tol") == before, "the old table is still there and whole"


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_a_stamp_is_added_once_and_changes_no_tensor(tiny_model_dir: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(tiny_model_dir, tmp_path / "model")
    fingerprint = read_fingerprint(model_dir)
    tensors = load_file(model_dir / WEIGHTS)
    save_file(tensors, model_dir / WEIGHTS, {"format": "pt", "author": "somebody else"})
    assert stamp(model_dir) == fingerprint, "the hash of the weights is what the writer stored"
    assert Checkpoint(model_dir).metadata == {
        "format": "pt",
        "author": "somebody else",
        FINGERPRINT_KEY: fingerprint,
    }
    assert equal(load_file(model_dir / WEIGHTS), tensors)
    before = (model_dir / WEIGHTS).stat()
    assert stamp(model_dir) == fingerprint
    after = (model_dir / WEIGHTS).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert {path.name for path in model_dir.iterdir()} == {path.name for path in tiny_model_dir.iterdir()}


def test_an_export_is_the_model_less_what_its_table_holds(tiny_model_dir: Path, tmp_path: Path) -> None:
    manifest = export(tiny_model_dir, tmp_path / "out")
    build_table(tiny_model_dir, tmp_path / "tol")
    assert files_in(tmp_path / "out" / "tol") == files_in(tmp_path / "tol")
    assert manifest == Table.open(tmp_path / "out" / "tol").manifest
    tensors = load_file(tiny_model_dir / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if not is_memory_tensor(name)}
    assert len(kept) < len(tensors)
    assert equal(load_file(tmp_path / "out" / WEIGHTS), kept)
    assert read_fingerprint(tmp_path / "out") == read_fingerprint(tiny_model_dir)
    for path in tiny_model_dir.iterdir():
        if path.name != WEIGHTS:
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_export_overwrites_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(CheckpointError, match="not empty"):
        export(tiny_model_dir, tmp_path)
    assert files_in(tmp_path) == before
