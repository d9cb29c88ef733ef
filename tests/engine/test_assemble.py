"""From settings to an engine: which table is served from, and what does not fit together."""

import fcntl
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from engine.driver import OpenEngine, open_engine, request, serve
from engine.test_engine import prompt_of
from tiny import tiny_config
from tolserve.engine.assemble import SettingsError, assemble, find_table
from tolserve.engine.config import EngineSettings
from tolserve.model.build import BuildOptions, build_table, export
from tolserve.model.checkpoint import WEIGHTS, is_memory_tensor, read_fingerprint
from tolserve.model.config import ModelConfig
from tolserve.tol.encoding import EncodingError, values_of
from tolserve.tol.frequencies import FrequencyError, write_frequencies
from tolserve.tol.table import Table, TableError
from tolserve.tol.writer import TableWriter


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to add to."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def found(model_dir: Path, cache: Path, **options: Any) -> Path:
    settings = EngineSettings(model=str(model_dir), cache_dir=str(cache), **options)
    return find_table(settings, model_dir, ModelConfig.load(model_dir)).path


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Of every file: which one it is, when it was written, what it holds."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def foreign_table(path: Path, fingerprint: str, vocab_size: int = 300, layers: int = 2, hidden_size: int = 32) -> Path:
    writer = TableWriter(
        path, vocab_size=vocab_size, num_layers=layers, hidden_size=hidden_size, fingerprint=fingerprint
    )
    writer.write(np.zeros((vocab_size, layers * hidden_size * 2), np.uint8))
    writer.finish()
    return path


def test_a_table_is_built_once_into_a_private_folder(model_dir: Path, cache: Path) -> None:
    table = found(model_dir, cache)
    assert table == cache / f"{read_fingerprint(model_dir)}-bf16"
    assert cache.stat().st_mode & 0o077 == 0, "others can read what was made from the model"
    before = state(table)
    assert found(model_dir, cache) == table
    assert state(table) == before
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [table.name]


def test_a_table_that_another_process_builds_is_waited_for(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    table = found(model_dir, cache)
    hidden = table.rename(tmp_path / "being-built")
    with (cache / f".{table.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results: list[Path] = []
        waiting = threading.Thread(target=lambda: results.append(found(model_dir, cache)))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        before = state(hidden.rename(table))
    waiting.join(60)
    assert results == [table]
    assert state(table) == before


def test_a_table_beside_the_model_goes_before_the_cache_and_a_given_one_before_both(
    model_dir: Path, cache: Path, tmp_path: Path
) -> None:
    built = found(model_dir, cache)
    shutil.copytree(built, model_dir / "tol")
    assert found(model_dir, cache) == model_dir / "tol"
    given = shutil.copytree(built, tmp_path / "given")
    assert found(model_dir, cache, table=str(given)) == given


def test_what_is_given_or_beside_is_used_or_refused_never_passed_over(model_dir: Path, cache: Path) -> None:
    with pytest.raises(TableError, match=r"nowhere.*no manifest"):
        found(model_dir, cache, table=str(model_dir / "nowhere"))
    (model_dir / "tol").mkdir()
    with pytest.raises(TableError, match=r"tol.*no manifest"):
        found(model_dir, cache)
    assert not cache.exists()


def test_a_table_of_another_model_is_refused(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    path = foreign_table(tmp_path / "other", "0" * 32)
    with pytest.raises(TableError, match=f"other weights.*{'0' * 32}.*tolserve table build"):
        found(model_dir, cache, table=str(path))


@pytest.mark.parametrize("shape", [{"vocab_size": 299}, {"layers": 3}, {"hidden_size": 64}])
def test_a_table_of_another_shape_is_refused(
    model_dir: Path, cache: Path, tmp_path: Path, shape: dict[str, int]
) -> None:
    path = foreign_table(tmp_path / "other", read_fingerprint(model_dir), **shape)
    with pytest.raises(TableError, match="shape"):
        found(model_dir, cache, table=str(path))


def test_a_table_of_another_encoding_is_refused(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    table = tmp_path / "table"
    build_table(model_dir, table)
    with pytest.raises(TableError, match="bf16, not --tol-encoding int8"):
        found(model_dir, cache, table=str(table), tol_encoding="int8")
    assert found(model_dir, cache, table=str(table), tol_encoding="int8", any_encoding=True) == table


def test_a_table_of_another_encoding_beside_the_model_is_passed_over(
    model_dir_of: Callable[[ModelConfig], Path], cache: Path
) -> None:
    model_dir = model_dir_of(tiny_config(hidden_size=64))
    build_table(model_dir, model_dir / "tol")
    built = found(model_dir, cache, tol_encoding="int8")
    assert built.name == f"{read_fingerprint(model_dir)}-int8"
    assert found(model_dir, cache) == model_dir / "tol"
    assert found(model_dir, cache, tol_encoding="int8", any_encoding=True) == model_dir / "tol"


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_another_encoding_is_built_once_beside_the_first(
    model_dir_of: Callable[[ModelConfig], Path], cache: Path, name: str
) -> None:
    model_dir = model_dir_of(tiny_config(hidden_size=64))
    plain, table = found(model_dir, cache), found(model_dir, cache, tol_encoding=name)
    assert (plain.name, table.name) == tuple(f"{read_fingerprint(model_dir)}-{each}" for each in ("bf16", name))
    assert Table.open(table).manifest.encoding.name == name
    before = state(table)
    assert found(model_dir, cache, tol_encoding=name) == table
    assert state(table) == before


@pytest.mark.parametrize("name", ["lowrank", "lowrank-int8", "lowrank-int4"])
def test_a_lowrank_table_is_selected_and_never_built_unasked(model_dir: Path, cache: Path, name: str) -> None:
    with pytest.raises(TableError, match=f"--tol-encoding {name}.*tolserve table build"):
        found(model_dir, cache, tol_encoding=name)
    assert not list(cache.glob("*"))
    values, _ = values_of(name)
    build_table(model_dir, model_dir / "tol", BuildOptions(values, group_size=8 if values != "bf16" else None, rank=8))
    assert found(model_dir, cache, tol_encoding=name) == model_dir / "tol"


def test_a_width_that_no_scale_divides_is_an_error_that_says_so(model_dir: Path, cache: Path) -> None:
    with pytest.raises(EncodingError, match="row of 32 values is no multiple of the group size 64.*--group-size"):
        found(model_dir, cache, tol_encoding="int8")
    assert not [path for path in cache.glob("*") if path.suffix != ".lock"]


def test_an_exported_model_gives_the_same_answers(
    model_dir: Path, cache: Path, tmp_path: Path, engine_of: OpenEngine
) -> None:
    export(model_dir, tmp_path / "export")
    assert not any(is_memory_tensor(name) for name in load_file(tmp_path / "export" / WEIGHTS))
    asked = request("r", prompt_of(20, 1), 12, logprobs=2)
    with engine_of(device_cache="30") as engine:
        answer = serve(engine, [asked])["r"]
    with open_engine(tmp_path / "export", cache, device_cache="30") as engine:
        assert serve(engine, [asked])["r"].text == answer.text
        assert engine.pager is not None
        assert engine.pager.table.path == tmp_path / "export" / "tol"
    assert not cache.exists(), "the table beside the model was enough"
    shutil.rmtree(tmp_path / "export" / "tol")
    with pytest.raises(TableError, match=r"neither.*nor memory tensors.*--table"):
        found(tmp_path / "export", cache)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_cache": "0"}, "--device-cache 0"),
        ({"max_model_len": 129}, "--max-model-len 129.*128"),
        ({"kv_cache": "20KiB"}, "--kv-cache 20KiB.*--max-model-len 128"),
        ({"device_cache": "lots"}, "lots"),
        ({"tol_policy": "magic"}, "magic"),
        ({"tol_policy": "static"}, "--tol-policy static needs --tol-frequencies"),
        ({"tol_frequencies": "/nowhere/list.npz"}, "no frequency list"),
        ({"tol_io": "mmap"}, "mmap"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    tiny_model_dir: Path, cache_dir: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        assemble(EngineSettings(model=str(tiny_model_dir), cache_dir=str(cache_dir), device="cpu", **options))


@pytest.mark.parametrize("policy", ["lru", "half-pinned", "context"])
def test_the_most_frequent_records_are_there_at_the_start(
    tiny_model_dir: Path, cache_dir: Path, tmp_path: Path, policy: str
) -> None:
    counts = np.zeros(300, np.int64)
    counts[[250, 40, 299]] = [5, 9, 1]
    write_frequencies(tmp_path / "list.npz", counts)
    options = {"tol_frequencies": str(tmp_path / "list.npz"), "tol_policy": policy}
    with open_engine(tiny_model_dir, cache_dir, device_cache="2", **options) as engine:
        assert engine.pager is not None
        assert {resident.token for resident in engine.pager.view(10).residents} == {40, 250}
    write_frequencies(tmp_path / "list.npz", counts[:299])
    with pytest.raises(FrequencyError, match="299 tokens; this one has 300"):
        assemble(EngineSettings(model=str(tiny_model_dir), cache_dir=str(cache_dir), device="cpu", **options))


def test_a_base_model_has_no_table(model_dir_of: Callable[[ModelConfig], Path], cache: Path, tmp_path: Path) -> None:
    base = model_dir_of(tiny_config("base"))
    with pytest.raises(SettingsError, match="base model has no table"):
        assemble(EngineSettings(model=str(base), cache_dir=str(cache), device="cpu", table=str(tmp_path)))
    for option in ("tol_frequencies", "tol_save_frequencies", "tol_trace"):
        given = {option: str(tmp_path / "file.npz")}
        with pytest.raises(SettingsError, match=f"--{option.replace('_', '-')} .*base model has no table"):
            assemble(EngineSettings(model=str(base), cache_dir=str(cache), device="cpu", **given))
    assert not list(tmp_path.glob("file*"))
    with open_engine(base, cache) as engine:
        assert engine.pager is None
    assert not cache.exists()


def test_the_kv_pool_is_as_large_as_was_asked_for(tiny_model_dir: Path, cache_dir: Path) -> None:
    # 2 layers x keys and values x 16 tokens x 2 heads of 8 x 4 bytes = 4,096 bytes a block
    with open_engine(tiny_model_dir, cache_dir, kv_cache="50KB") as engine:
        assert engine.scheduler.pool.blocks == 12
        assert engine.runner.kv.data.nbytes == 12 * 4096
    with open_engine(tiny_model_dir, cache_dir, max_num_seqs=3) as engine:
        assert engine.scheduler.pool.blocks == 3 * 8, "every sequence has room for 128 tokens"
