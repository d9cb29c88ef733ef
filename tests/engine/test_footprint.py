"""What is said before a start against what an engine then holds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.driver import open_engine
from engine.flights import open_ahead
from engine.test_assemble import foreign_table
from tiny import tiny_config
from tolserve.cli import main
from tolserve.engine.config import EngineSettings
from tolserve.engine.footprint import footprint, ready_table
from tolserve.model.build import BuildOptions, build_table, export
from tolserve.model.checkpoint import CheckpointError
from tolserve.model.config import FfnVariant, ModelConfig
from tolserve.settings import DEMO_MODEL
from tolserve.tol.table import Table, TableError


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["table", "plan", *argv, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_the_demo_model_takes_what_the_plan_says(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path_factory.mktemp("demo")
    options = {"host_cache": "7%", "kv_cache": "100MB", "dtype": "bfloat16"}
    argv = [word for name, given in options.items() for word in ("--" + name.replace("_", "-"), given)]
    argv += ["--cache-dir", str(cache), "--device-cache", "1MiB"]
    before = planned(capsys, *argv)
    assert (before["table"]["path"], before["disk"]) == (None, None)
    with open_engine(DEMO_MODEL, cache, device_cache="1MiB", **options) as engine:
        assert engine.pager is not None
        (row, _) = (row for row in before["rows"] if row["slots"] == 256)
        memory = before["memory"]
        model = engine.runner.model
        assert memory["layers"] + memory["embedding"] == model.nbytes
        assert memory["embedding"] == model.embedding.nbytes
        assert memory["kv"] == engine.runner.kv.data.nbytes
        assert memory["kv_tokens"] == engine.scheduler.pool.blocks * engine.runner.kv.block_size
        device_bytes = sum(part.arena.data.nbytes for part in engine.pager.parts)
        assert row["device_bytes"] == device_bytes
        assert memory["host_cache"] == engine.pager.host.slots * engine.pager.table.manifest.record_bytes
        held = model.nbytes + engine.runner.kv.data.nbytes + device_bytes
        assert row["total_bytes"] == held + memory["host_cache"]
        assert (memory["dtype"], memory["weights"]) == ("bfloat16", "bfloat16")
    after = planned(capsys, *argv)
    assert after["table"] == before["table"] | {"path": str(engine.pager.table.path)}
    assert after["disk"]["reads"] > 20
    assert [row["total_bytes"] for row in after["rows"]] == [row["total_bytes"] for row in before["rows"]]
    assert all(row["stall_ms"] >= 0 for row in after["rows"])


@pytest.mark.parametrize("variant", ["memory", "base", "flex"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_weights_and_kv_of_every_kind(
    model_dir_of: Callable[[ModelConfig], Path], cache_dir: Path, variant: FfnVariant, tied: bool, weights: Any
) -> None:
    """Kernels pad a matrix to whole panels of rows, which is more than 1% of tiny ones alone: 304 tokens need 320."""
    shape = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 64, "tie_word_embeddings": tied}
    model_dir = model_dir_of(tiny_config(variant, **shape))
    settings = EngineSettings(model=str(model_dir), cache_dir=str(cache_dir), device="cpu", weights=weights)
    said = footprint(settings, ModelConfig.load(model_dir), None)
    with open_ahead(model_dir, cache_dir, weights=weights) as ahead:
        theirs = footprint(settings, ModelConfig.load(model_dir), None, ahead=True)
        assert theirs.kv == ahead.runner.kv.data.nbytes > said.kv
        assert theirs.kv_tokens == said.kv_tokens == ahead.scheduler.pool.blocks * ahead.runner.kv.block_size
    with open_engine(model_dir, cache_dir, weights=weights) as engine:
        model = engine.runner.model
        ends = {id(weight): weight.nbytes for weight in (model.embedding, model.head)}
        padding = 320 / 304
        assert said.embedding <= sum(ends.values()) <= said.embedding * padding
        assert said.layers == model.nbytes - sum(ends.values())
        assert said.kv == engine.runner.kv.data.nbytes
        held = {weight.encoding for layer in model.layers for weight in layer.weights()}
        assert said.weights == " and ".join(sorted(held | {model.head.encoding, model.embedding.encoding}))


def test_a_folder_without_weights_is_planned_in_dtype(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copy2(tiny_model_dir / "config.json", tmp_path)
    for dtype in ("float32", "bfloat16"):
        settings = EngineSettings(model=str(tmp_path), cache_dir=str(tmp_path), device="cpu", dtype=dtype)
        assert footprint(settings, ModelConfig.load(tmp_path), None).weights == dtype


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32"])
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_gpu_is_planned_for_where_there_is_none(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, weights: str
) -> None:
    argv = [str(tiny_model_dir), "--cache-dir", str(tmp_path), "--dtype", dtype, "--weights", weights]
    gpu = planned(capsys, *argv, "--device", "cuda")["memory"]
    held = "bfloat16" if dtype == "auto" else dtype
    assert gpu["dtype"] == held
    assert gpu["weights"] == (held if weights == "auto" else weights)
    cpu = planned(capsys, *argv, "--device", "cpu")["memory"]
    assert cpu["dtype"] == ("float32" if dtype == "auto" else dtype)
    wider = 2 if dtype == "auto" else 1
    assert cpu["kv"] / cpu["kv_tokens"] == pytest.approx(wider * gpu["kv"] / gpu["kv_tokens"], rel=0.05)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_table_of_another_encoding_is_as_planned(
    model_dir_of: Callable[[ModelConfig], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    model_dir = model_dir_of(tiny_config(hidden_size=64))
    argv = [str(model_dir), "--cache-dir", str(tmp_path), "--encoding", encoding, "--device-cache", "50"]
    before = planned(capsys, *argv)
    with open_engine(model_dir, tmp_path, tol_encoding=encoding, device_cache="50") as engine:
        assert engine.pager is not None
        held = sum(part.arena.data.nbytes for part in engine.pager.parts)
        assert {row["device_bytes"] for row in before["rows"] if row["slots"] == 50} == {held}
    assert planned(capsys, *argv)["table"] == before["table"] | {"path": str(engine.pager.table.path)}


def test_the_factors_of_a_lowrank_table_count(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_table(tiny_model_dir, tmp_path / "table", BuildOptions(rank=8))
    plan = planned(capsys, str(tiny_model_dir), "--table", str(tmp_path / "table"))
    assert plan["table"]["encoding"] == "lowrank"
    table = Table.open(tmp_path / "table")
    with open_engine(tiny_model_dir, tmp_path, table=str(table.path), tol_encoding="lowrank") as engine:
        held = sum(factor.nbytes for factor in engine.runner.factors.values())
    assert plan["memory"]["factors"] == held == 2 * 8 * 32 * 4, "float32, as the stream"


def ready(model_dir: Path, cache: Path, encoding: str | None = None, table: Path | None = None) -> Path | None:
    given = str(table) if table is not None else None
    settings = EngineSettings(model=str(model_dir), cache_dir=str(cache), table=given)
    found = ready_table(settings, model_dir, ModelConfig.load(model_dir), encoding)
    return found.path if found is not None else None


def test_the_table_that_a_start_would_open(tiny_model_dir: Path, tmp_path: Path) -> None:
    model_dir, cache = shutil.copytree(tiny_model_dir, tmp_path / "model"), tmp_path / "cache"
    assert ready(model_dir, cache) is None
    assert not cache.exists(), "a plan builds nothing"
    with open_engine(model_dir, cache) as engine:
        assert engine.pager is not None
        assert ready(model_dir, cache) == engine.pager.table.path
    build_table(model_dir, model_dir / "tol")
    assert ready(model_dir, cache) == model_dir / "tol"
    assert ready(model_dir, cache, "bf16") == model_dir / "tol"
    assert ready(model_dir, cache, "int8") is None
    with pytest.raises(TableError, match="bf16, not --tol-encoding int8"):
        ready(model_dir, cache, "int8", table=model_dir / "tol")
    with pytest.raises(TableError, match="other weights"):
        ready(model_dir, cache, table=foreign_table(tmp_path / "other", "0" * 32))


def test_what_a_table_would_be_built_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    export(tiny_model_dir, tmp_path / "export")
    assert ready(tmp_path / "export", tmp_path / "cache") == tmp_path / "export" / "tol"
    shutil.rmtree(tmp_path / "export" / "tol")
    with pytest.raises(TableError, match="neither a table nor memory tensors"):
        ready(tmp_path / "export", tmp_path / "cache")
    (tmp_path / "shape").mkdir()
    shutil.copy2(tiny_model_dir / "config.json", tmp_path / "shape")
    assert ready(tmp_path / "shape", tmp_path / "cache") is None
    build_table(tiny_model_dir, tmp_path / "table")
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        ready(tmp_path / "shape", tmp_path / "cache", table=tmp_path / "table")


def test_a_base_model_has_weights_and_keys_alone(
    model_dir_of: Callable[[ModelConfig], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(model_dir_of(tiny_config("base")))
    plan = planned(capsys, base)
    assert plan["memory"]["total"] > 0
    assert (plan["table"], plan["disk"], plan["rows"]) == (None, None, [])
    assert main(["table", "plan", base]) == 0
    assert "A base model has no table" in capsys.readouterr().out
    assert main(["table", "plan", base, "--device-cache", "10%"]) == 2
    assert "--device-cache: a base model has no table" in capsys.readouterr().err
