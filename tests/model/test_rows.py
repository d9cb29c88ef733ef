"""Rows out of tables of every kind, against the networks that they were made of."""

from pathlib import Path

import pytest
import torch

from tolserve.model.build import BuildOptions, build_table
from tolserve.model.checkpoint import load_transformer
from tolserve.model.edits import table_rows
from tolserve.tol.table import Table

TOKENS = [7, 3, 7, 250]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(BuildOptions(), 2**-8), (BuildOptions(dropped_layers=(0,)), 2**-8), (BuildOptions(rank=32), 0.02)],
)
def test_rows_are_what_the_networks_gave(
    tiny_model_dir: Path, tmp_path: Path, options: BuildOptions, tolerance: float
) -> None:
    build_table(tiny_model_dir, tmp_path / "tol", options)
    table = Table.open(tmp_path / "tol")
    model = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.float32)
    embedding = model.model.embed_tokens(torch.tensor(TOKENS))
    expected = torch.stack([layer.memory_row(embedding) for layer in model.model.layers], 1).detach()
    for layer in options.dropped_layers:
        expected[:, layer] = 0
    found = table_rows(table, TOKENS, [1, 0])
    torch.testing.assert_close(found.flip(1), expected, rtol=tolerance, atol=tolerance * expected.std().item())


@pytest.mark.parametrize("options", [BuildOptions(), BuildOptions(dropped_layers=(0,)), BuildOptions(rank=32)])
def test_transformers_adds_the_same_rows(tiny_model_dir: Path, tmp_path: Path, options: BuildOptions) -> None:
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    from tolserve.model.hf import table_rows as lookup

    build_table(tiny_model_dir, tmp_path / "tol", options)
    table = Table.open(tmp_path / "tol")
    rows = table_rows(table, TOKENS, [0, 1])
    add, x = lookup(table, torch.tensor([TOKENS])), torch.randn(1, len(TOKENS), rows.shape[-1])
    for layer in (0, 1):
        torch.testing.assert_close(add(layer, x)[0] - x[0], rows[:, layer], rtol=1e-4, atol=1e-4)
