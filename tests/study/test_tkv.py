"""Coefficients against the networks and float64; neighbours, clusters and cells against an obvious search."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from reference import Reference, silu, weights_of
from tiny import random_model, tiny_config
from tolserve.cli import main
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ModelConfig
from tolserve.settings import DEMO_MODEL
from tolserve.study import tkv
from tolserve.study.report import StudyError, write
from tolserve.study.settings import StudyTkvSettings

VOCABULARY = 300


@pytest.mark.parametrize("variant", ["memory", "flex"])
def test_coefficients_and_values_follow_the_paper(variant: str) -> None:
    """Eq. 2.7 in float64; and the values weighted by them are the row of eq. 2.6."""
    model = random_model(tiny_config(variant))
    reference = Reference(model.config, weights_of(model))
    tokens = torch.tensor([0, 7, 7, 299])
    for layer in range(2):
        name = f"model.layers.{layer}.memory"
        c, v = tkv.coefficients(model, layer, tokens), tkv.values(model, layer)
        assert c.shape == (4, model.config.intermediate_size)
        for token, found in zip(tokens.tolist(), c, strict=True):
            query = reference.norm(reference.weights["model.embed_tokens.weight"][token], name + "_layernorm")
            gate, up = (reference.linear(query, f"{name}.{part}_proj") for part in ("gate", "up"))
            assert np.allclose(found, silu(gate) * up, rtol=1e-4, atol=1e-4)
            row = reference.row(token, layer)
            assert np.allclose(found @ v, row, rtol=1e-3, atol=1e-4 * np.abs(row).max())


def test_the_demo_models_rows_are_its_coefficients_times_its_values() -> None:
    model = load_transformer(DEMO_MODEL, with_memory=True, dtype=torch.float32)
    tokens = tkv.sample_tokens(model.config.vocab_size, 64, seed=1)
    for layer, block in enumerate(model.model.layers):
        rows = block.memory_row(model.model.embed_tokens(tokens))
        found = tkv.coefficients(model, layer, tokens) @ tkv.values(model, layer)
        assert torch.allclose(found, rows, rtol=1e-4, atol=1e-5 * float(rows.abs().max()))


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 3))
def test_a_sample_has_no_token_twice(vocabulary: int, sample: int, seed: int) -> None:
    tokens = tkv.sample_tokens(vocabulary, sample, seed).tolist()
    assert len(tokens) == min(vocabulary, sample)
    assert tokens == sorted(set(tokens))
    assert 0 <= tokens[0] <= tokens[-1] < vocabulary
    assert tokens == tkv.sample_tokens(vocabulary, sample, seed).tolist()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config())
    asked = torch.tensor([5, 250])
    whole = tkv.nearest_tokens(model, 1, asked, 9), tkv.read_cells(model, 1, [3], 9)
    monkeypatch.setattr(tkv, "CHUNK", 37)
    parts = tkv.nearest_tokens(model, 1, asked, 9), tkv.read_cells(model, 1, [3], 9)
    assert torch.equal(whole[0][1], parts[0][1])
    assert [token for token, _ in whole[1][0].excited_by] == [token for token, _ in parts[1][0].excited_by]
    every = torch.arange(VOCABULARY)
    assert np.allclose(tkv.sampled_coefficients(model, 0, every), tkv.coefficients(model, 0, every), rtol=1e-5)


def test_outliers_are_counted_beyond_six_deviations() -> None:
    c = np.random.default_rng(0).choice([-1.0, 1.0], (50, 40)).astype(np.float32)
    c[3, 5], c[3, 6], c[9, 0] = 20.0, -20.0, 5.0  # the deviation becomes sqrt(1 + 2 * 400 / 2000) = 1.2
    assert tkv.outliers_per_token(c) == 2 / 50
    assert tkv.outliers_per_token(1000 * c) == 2 / 50


@given(st.integers(2, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_clustering_coefficient_equals_its_definition(n: int, near: int, clusters: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(n, 3)).astype(np.float32)
    labels = generator.integers(clusters, size=n)
    shares = []
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: float(np.linalg.norm(points[i] - points[j])))
        shares.append(np.mean([labels[j] == labels[i] for j in others[:near]]))
    assert tkv.clustering_coefficient(points, labels, near) == pytest.approx(np.mean(shares))


def test_shuffling_keeps_the_cells_and_loses_the_tokens() -> None:
    c = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    other = tkv.shuffled(c, seed=0)
    assert np.array_equal(np.sort(other, axis=0), np.sort(c, axis=0))
    assert not (other == c).all(axis=1).any()


def test_clusters_are_found_largest_first_and_most_central_first() -> None:
    generator = np.random.default_rng(0)
    centres, sizes = np.eye(3, 8, dtype=np.float32), (10, 30, 20)
    points = np.concatenate([c + generator.normal(0, 0.05, (n, 8)) for c, n in zip(centres, sizes, strict=True)])
    points = tkv.unit(points.astype(np.float32))
    found = tkv.find_clusters(points, 3, seed=0)
    assert found.labels.tolist() == [2] * 10 + [0] * 30 + [1] * 20
    for label, central in enumerate(found.central):
        members = np.flatnonzero(found.labels == label)
        assert sorted(central) == members.tolist()
        distances = np.linalg.norm(points[central] - points[members].mean(axis=0), axis=1)
        assert (np.diff(distances) >= -1e-6).all()
    assert tkv.clustering_coefficient(points, found.labels, 5) == 1.0
    with pytest.raises(StudyError, match="sample has 60"):
        tkv.find_clusters(points, 61, seed=0)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_projection_keeps_far_groups_apart(method: tkv.Projection) -> None:
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(at, 0.1, (20, 60)) for at in (0, 3)]).astype(np.float32)
    placed = tkv.project(points, method, seed=0)
    assert placed.shape == (40, 2)
    gap = np.linalg.norm(placed[:20].mean(axis=0) - placed[20:].mean(axis=0))
    assert gap > 2 * max(np.linalg.norm(part - part.mean(axis=0), axis=1).mean() for part in (placed[:20], placed[20:]))
    assert np.array_equal(placed, tkv.project(points, method, seed=0))


def test_neighbours_equal_a_search_over_all_tokens() -> None:
    model = random_model(tiny_config())
    c = tkv.coefficients(model, 1, torch.arange(VOCABULARY)).double().numpy()
    cosines, ids = tkv.nearest_tokens(model, 1, torch.tensor([4, 200]), 6)
    for token, found, alike in zip((4, 200), ids.tolist(), cosines.tolist(), strict=True):
        cosine = {t: c[t] @ c[token] / np.linalg.norm(c[t]) / np.linalg.norm(c[token]) for t in range(VOCABULARY)}
        expected = sorted(cosine.keys() - {token}, key=lambda t: -cosine[t])[:6]
        assert found == expected
        assert alike == pytest.approx([cosine[t] for t in expected], abs=1e-5)
    assert len(tkv.nearest_tokens(model, 1, torch.tensor([4]), 10_000)[1][0]) == VOCABULARY - 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_cell_is_read_through_final_norm_and_head(tied: bool) -> None:
    model = random_model(tiny_config(tie_word_embeddings=tied))
    weights = weights_of(model)
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    c = tkv.coefficients(model, 0, torch.arange(VOCABULARY))
    for cell in tkv.read_cells(model, 0, [0, 47], 5):
        value = weights["model.layers.0.memory.down_proj.weight"][:, cell.cell]
        logits = head @ (value * weights["model.norm.weight"])
        order = np.argsort(-logits)
        assert [token for token, _ in cell.promotes] == order[:5].tolist()
        assert [token for token, _ in cell.suppresses] == order[::-1][:5].tolist()
        assert [logit for _, logit in cell.promotes] == pytest.approx(logits[order[:5]], rel=1e-3)
        asked = c[:, cell.cell]
        assert [token for token, _ in cell.excited_by] == asked.abs().argsort(descending=True)[:5].tolist()
        assert all(number == pytest.approx(float(asked[token])) for token, number in cell.excited_by)


def test_the_strongest_cells_add_most_to_the_rows() -> None:
    model = random_model(tiny_config())
    c = tkv.sampled_coefficients(model, 0, torch.arange(100))
    lengths = tkv.values(model, 0).norm(dim=-1)
    strength = [float(lengths[i] * np.abs(c[:, i]).mean()) for i in range(48)]
    assert tkv.strongest_cells(model, 0, c, 7) == sorted(range(48), key=lambda i: -strength[i])[:7]


def test_tokens_are_named_by_their_text(tokenizer: Tokenizer) -> None:
    for token in range(tokenizer.get_vocab_size()):
        text = tkv.token_text(tokenizer, token)
        assert text
        assert "\ufffd" not in text
    assert tkv.token_text(tokenizer, tkv.token_of(tokenizer, "e")) == "e"
    with pytest.raises(StudyError, match="tokens \\('.*give one"):
        tkv.token_of(tokenizer, "e xyz")
    with pytest.raises(StudyError, match="none"):
        tkv.token_of(tokenizer, "")


def test_the_study_says_what_its_parts_say(tmp_path: Path, tiny_model_dir: Path, tokenizer: Tokenizer) -> None:
    options = {"layer": 1, "clusters": 5, "tokens": ["e", "T"], "cells": [3, 0], "sample": 200, "projection": "pca"}
    study = tkv.run(tiny_model_dir, **options)
    model = load_transformer(tiny_model_dir, with_memory=True, dtype=torch.float32)
    ids = tkv.sample_tokens(model.config.vocab_size, 200, 0)
    assert [row["layer"] for row in study.rows] == [0, 1]
    for row in study.rows:
        c = tkv.sampled_coefficients(model, row["layer"], ids)
        points = tkv.unit(c)
        labels = tkv.find_clusters(points, 5, 0).labels
        assert row["outliers_per_token"] == tkv.outliers_per_token(c)
        assert row["clustering"] == tkv.clustering_coefficient(points, labels)
    assert study.extra["projection"]["clusters"] == labels.tolist()  # of layer 1
    assert sum(cluster["size"] for cluster in study.extra["clusters"]) == len(ids)
    assert [found["token"] for found in study.extra["neighbours"]] == ["e", "T"]
    _, near = tkv.nearest_tokens(model, 1, torch.tensor([tokenizer.token_to_id("e")]), 1)
    assert study.extra["neighbours"][0]["nearest"][0][0] == tkv.token_text(tokenizer, int(near[0, 0]))
    assert [(cell["layer"], cell["cell"]) for cell in study.extra["cells"]] == [(1, 3), (1, 0)]
    paths = write(study, tmp_path, lambda figure: tkv.draw(study, figure))
    assert [path.name for path in paths] == ["tkv.json", "tkv.md", "tkv.png"]
    again = tkv.run(tiny_model_dir, **options)
    assert (again.rows, again.extra) == (study.rows, study.extra)


def test_without_cells_the_strongest_are_read(tiny_model_dir: Path) -> None:
    study = tkv.run(tiny_model_dir, clusters=2, projection="pca")
    assert len(study.extra["cells"]) == tkv.SHOWN
    assert study.extra["neighbours"] == []


def test_what_a_model_cannot_be_asked_is_refused(
    tiny_model_dir: Path, model_dir_of: Callable[[ModelConfig], Path]
) -> None:
    with pytest.raises(StudyError, match="layers 0 to 1"):
        tkv.run(tiny_model_dir, layer=2)
    begun: list[int] = []
    with pytest.raises(StudyError, match="--cells 48: the layers have cells 0 to 47"):
        tkv.run(tiny_model_dir, cells=[3, 48], progress=lambda done, total: begun.append(done))
    assert not begun  # before the clusters of any layer, which take minutes at size
    with pytest.raises(StudyError, match="base model"):
        tkv.run(model_dir_of(tiny_config("base")))


def test_the_command_writes_and_prints_what_people_read(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["study", "tkv", str(tiny_model_dir), "--out", str(tmp_path), "--clusters", "3", "--projection", "pca"]
    assert main([*argv, "--token", "e", "--token", "T", "--cells", "5,6", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for line in ("layer 0, cluster 2 of", "layer 0, nearest to 'T':", "layer 0, cell 6: asked by"):
        assert line in printed
        assert line in (tmp_path / "tkv.md").read_text()
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "tkv.json").read_text())
    assert main([*argv, "--token", "two words"]) == 1
    assert "--token 'two words'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--token", " king", "--token", " queen"], ["--token", " king, queen"]])
def test_tokens_keep_their_spaces_on_the_command_line(words: list[str]) -> None:
    assert StudyTkvSettings.load(["m", "--out", "o", *words], "tkv").token == (" king", " queen")
