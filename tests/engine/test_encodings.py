"""Serving from tables of every encoding: what a step adds is what the table's bytes say, wherever they came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from engine.driver import OpenEngine, request, serve
from engine.test_engine import prompt_of
from reference import Reference, weights_of
from tiny import tiny_config
from tol.reference import decode
from tol.tables import value
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.checkpoint import load_transformer
from tolserve.model.config import ModelConfig
from tolserve.tol.encoding import values_of
from tolserve.tol.table import Table

OPTIONS = {
    "bf16": BuildOptions(),
    "int8": BuildOptions("int8"),
    "int4": BuildOptions("int4", group_size=16, dropped_layers=(1, 3)),
    "lowrank": BuildOptions(energy=0.9),
    "lowrank-int8": BuildOptions("int8", rank=24, group_size=8),
    "lowrank-int4": BuildOptions("int4", energy=0.99, dropped_layers=(0,)),
}


@pytest.fixture(scope="module")
def model_dir(model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    """Six layers, so that records have two groups."""
    return model_dir_of(tiny_config(hidden_size=64, num_hidden_layers=6))


def rows_of(table: Table) -> npt.NDArray[np.float32]:
    """Every layer's row of every token as the slow reference decodes it, [layers, tokens, d]; zero where dropped."""
    manifest = table.manifest
    rows = np.zeros((manifest.num_layers, manifest.vocab_size, manifest.hidden_size), np.float32)
    factors = table.read_factors()
    for token in range(manifest.vocab_size):
        record = table.read_record(token).tobytes()
        for layer in manifest.layers:
            group, row = manifest.row_layout(layer)
            start = manifest.groups[group].offset + row.offset
            found = decode(record[start:], row.width, row.values, row.group_size)
            if layer in factors:
                found = found @ torch.from_numpy(factors[layer]).view(torch.bfloat16).float().numpy()
            rows[layer, token] = found
    return rows


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_adds_what_the_tables_bytes_say(
    engine_of: OpenEngine, model_dir: Path, tmp_path: Path, name: str
) -> None:
    build_table(model_dir, tmp_path / "tol", OPTIONS[name])
    table = Table.open(tmp_path / "tol")
    assert table.manifest.encoding.name == name
    assert len(table.manifest.groups) == (2 if len(table.manifest.layers) >= 4 else 1)
    rows = torch.from_numpy(rows_of(table))
    model = load_transformer(model_dir, with_memory=True, dtype=torch.float32)

    def add_from_table(tokens: Tensor, alpha: float = 1.0) -> Callable[[int, Tensor], Tensor]:
        return lambda layer, x: x + rows[layer][tokens]

    model.live_rows = add_from_table  # type: ignore[method-assign]
    prompt = prompt_of(37, 1)
    options: dict[str, Any] = {"model_dir": model_dir, "table": str(table.path), "tol_encoding": name}
    answers = []
    for cache in ({"device_cache": "100%"}, {"device_cache": "40"}, {"device_cache": "40", "host_cache": "50"}):
        with engine_of(**options, **cache) as engine:
            answers.append(serve(engine, [request("a", prompt, 12, logprobs=0)])["a"])
            assert cache["device_cache"] == "100%" or value(engine.registry, "tol_misses_total") > 0
    assert answers[0].text == answers[1].text == answers[2].text, "the same bits from every tier"
    text = prompt + answers[0].tokens
    with torch.inference_mode():
        exact = model(torch.tensor([text])).log_softmax(-1)[0]
    for at, score in enumerate(answers[0].logprobs, len(prompt) - 1):
        assert score.token == int(exact[at].argmax())
        assert abs(score.logprob - float(exact[at].max())) < 1e-3


# Largest error of a row as a share of its largest value, against FFNs in float64; int4's rows lose the level that
# two's complement lacks above zero, an eighth of the group's largest value at most.
BOUNDS = {"bf16": 2.0**-8, "int8": 0.5 / 127 + 2.0**-9, "int4": 1 / 8 + 2.0**-9}


@pytest.mark.parametrize("name", BOUNDS)
def test_rows_are_as_close_to_the_ffns_as_their_encoding_allows(model_dir: Path, tmp_path: Path, name: str) -> None:
    build_table(model_dir, tmp_path / "tol", BuildOptions(values_of(name)[0]))
    rows = rows_of(Table.open(tmp_path / "tol"))
    model = load_transformer(model_dir, with_memory=True, dtype=torch.float32)
    reference = Reference(model.config, weights_of(model))
    for layer in range(6):
        for token in range(0, 300, 3):
            exact = reference.row(token, layer)
            assert np.abs(rows[layer, token] - exact).max() <= BOUNDS[name] * np.abs(exact).max() * 1.01


def test_low_rank_keeps_the_share_of_the_norm_that_was_asked_for(model_dir: Path, tmp_path: Path) -> None:
    build_table(model_dir, tmp_path / "plain")
    plain = rows_of(Table.open(tmp_path / "plain")).astype(np.float64)
    ranks = []
    for energy in (0.5, 0.9, 0.999):
        build_table(model_dir, tmp_path / f"{energy}", BuildOptions(energy=energy))
        table = Table.open(tmp_path / f"{energy}")
        lost = ((rows_of(table) - plain) ** 2).sum((1, 2)) / (plain**2).sum((1, 2))
        assert (lost <= 1 - energy + 1e-4).all()
        for layer, rank in enumerate(table.manifest.encoding.ranks or ()):
            _, values, _ = np.linalg.svd(plain[layer])
            shares = np.cumsum(values**2) / (values**2).sum()
            least = int((shares < energy).sum()) + 1
            assert rank == -(-least // 8) * 8, "the least rank, in whole steps of eight"
        ranks.append(table.manifest.encoding.ranks)
    assert ranks[0] < ranks[1] < ranks[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4, "energy": 0.5}, "--rank and --energy"),
        ({"group_size": 32}, "--group-size"),
        ({"energy": 1.5}, "--energy"),
        ({"energy": 0.0}, "--energy"),
        ({"rank": 65}, "--rank 65"),
        ({"values": "int8", "group_size": 48}, "no multiple of the group size 48"),
        ({"values": "int8", "group_size": 4}, "group size 4"),
        ({"dropped_layers": (6,)}, "--drop-layers 6: the model's layers are 0 to 5"),
        ({"dropped_layers": (1, 1)}, "--drop-layers"),
        ({"dropped_layers": tuple(range(6))}, "--drop-layers"),
    ],
)
def test_options_that_make_no_table_are_refused_by_name(
    model_dir: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_table(model_dir, tmp_path / "tol", BuildOptions(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["gone", "short", "flipped", "foreign"])
def test_damaged_factors_are_refused(engine_of: OpenEngine, model_dir: Path, tmp_path: Path, damage: str) -> None:
    build_table(model_dir, tmp_path / "tol", BuildOptions(rank=8))
    file = tmp_path / "tol" / "factors.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-5] ^= 4
    elif damage == "foreign":
        content = content.replace(Table.open(file.parent).manifest.fingerprint.encode(), b"0" * 32)
    file.write_bytes(content[:-2] if damage == "short" else content)
    if damage == "gone":
        file.unlink()
    with (
        pytest.raises(ValueError, match=r"factors\.safetensors"),
        engine_of(model_dir=model_dir, table=str(file.parent), tol_encoding="lowrank"),
    ):
        pass
