"""An engine whose tiers and table change between its steps."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.driver import (
    Answers,
    OpenEngine,
    assert_idle,
    collect,
    finish,
    replay,
    request,
    serve,
    serve_recorded,
    submit,
)
from engine.test_engine import mixed_requests
from tiny import tiny_config
from tolserve.engine.engine import Engine
from tolserve.model.build import BuildOptions, build_table
from tolserve.tol.table import TableError

BUILDS = {
    "bf16": BuildOptions(),
    "int8": BuildOptions("int8", group_size=8),
    "lowrank": BuildOptions(rank=8),
    "lowrank-int4": BuildOptions("int4", group_size=8, rank=16),
}


@pytest.fixture(scope="module")
def tables(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model's table in several encodings."""
    folder = tmp_path_factory.mktemp("tables")
    for name, options in BUILDS.items():
        build_table(tiny_model_dir, folder / name, options)
    return {name: folder / name for name in BUILDS}


def put(table: Path, path: Path) -> Path:
    """Another table at a path, as a build would put it there: new files."""
    shutil.rmtree(path, ignore_errors=True)
    return shutil.copytree(table, path)


def texts(answers: Answers) -> list[object]:
    return [answer.text for _, answer in sorted(answers.items())]


def tokens(answers: Answers) -> list[list[int]]:
    """What is the same for other compositions of steps as well; no two logits are close in these runs."""
    return [answer.tokens for _, answer in sorted(answers.items())]


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "bf16"])
def test_a_reopened_table_of_another_encoding_is_served_as_from_the_start(
    engine_of: OpenEngine, tables: dict[str, Path], tmp_path: Path, name: str
) -> None:
    asked = mixed_requests()
    shape = {"max_num_batched_tokens": 16}
    with engine_of(table=str(tables[name]), tol_encoding=name, device_cache="40", **shape) as engine:
        answers, steps = serve_recorded(engine, {0: asked})
    expected = texts(answers)
    path = put(tables["bf16"], tmp_path / "table")
    with engine_of(table=str(path), device_cache="60", host_cache="30", **shape) as engine:
        plain = texts(replay(engine, asked, steps))
        assert plain != expected
        put(tables[name], path)
        facts = engine.reopen()
        assert facts["encoding"]["name"] == name
        shutil.rmtree(path)  # everything that is needed was opened
        assert texts(replay(engine, asked, steps)) == expected
        assert_idle(engine)
        put(tables["bf16"], path)
        engine.reopen()
        assert texts(replay(engine, asked, steps)) == plain


def test_a_table_that_cannot_be_used_leaves_the_old_one_in_use(
    engine_of: OpenEngine, tables: dict[str, Path], tmp_path: Path, model_dir_of: Callable[..., Path]
) -> None:
    asked = mixed_requests()
    path = put(tables["lowrank"], tmp_path / "table")

    def damaged_factors() -> None:
        factors = put(tables["lowrank-int4"], path) / "factors.safetensors"
        with factors.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"\x00\x7f\x11")

    def other_weights() -> None:
        shutil.rmtree(path)
        build_table(model_dir_of(tiny_config(intermediate_size=56)), path)

    with engine_of(table=str(path), tol_encoding="lowrank", device_cache="40") as engine:
        expected = tokens(serve(engine, asked))
        for spoil in (damaged_factors, other_weights, lambda: shutil.rmtree(path)):
            spoil()
            with pytest.raises(TableError):
                engine.reopen()
            assert tokens(serve(engine, asked)) == expected
            assert_idle(engine)


def resize_every_step(engine: Engine, sizes: list[str]) -> Answers:
    answers: Answers = {}
    submit(engine, mixed_requests())
    for number in range(60):
        collect(answers, engine.step())
        engine.resize(sizes[number % len(sizes)], sizes[number // 2 % len(sizes)] if number % 3 else None)
    return finish(engine, answers)


def test_requests_do_not_notice_that_tiers_change_their_size(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="100%", max_num_batched_tokens=16) as engine:
        expected = tokens(serve(engine, mixed_requests()))
    with engine_of(device_cache="16", host_cache="20", max_num_batched_tokens=16) as engine:
        assert tokens(resize_every_step(engine, ["9", "120", "3", "50%", "16"])) == expected
        assert_idle(engine)


def test_what_cannot_be_is_refused_and_changes_nothing(
    engine_of: OpenEngine, model_dir_of: Callable[..., Path]
) -> None:
    with engine_of(device_cache="16", host_cache="20") as engine:
        for device, host in (("0", None), ("12", "lots"), ("12", "100%"), (None, "0.001%")):
            with pytest.raises(ValueError, match=r"at least 1|not understood|restart|no record"):
                engine.resize(device, host)
        sizes = engine.resize(None, None)
        assert (sizes.device.slots, sizes.host.slots) == (16, 20)
        serve(engine, [request("r", [1, 2, 3])])
    with engine_of(model_dir_of(tiny_config("base"))) as engine:
        for change in (engine.reopen, lambda: engine.resize("12", None)):
            with pytest.raises(ValueError, match="no table"):
                change()
