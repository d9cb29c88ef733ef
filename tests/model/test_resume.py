"""Builds that stop half way: what is right is kept, and the table is the same as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny import tiny_config
from tolserve.model.build import BuildOptions, build_table, export
from tolserve.model.config import ModelConfig
from tolserve.model.networks import TOKENS_PER_BATCH
from tolserve.tol.encoding import EncodingError
from tolserve.tol.table import Table, TableError, verify

BATCHES = 6
VOCAB = (BATCHES - 1) * TOKENS_PER_BATCH + 100
OPTIONS = {
    "bf16": BuildOptions(),
    "int4": BuildOptions("int4", group_size=32),
    "lowrank-int8": BuildOptions("int8", rank=8, dropped_layers=(1,), group_size=8),
}
BUILD = """
import sys
from pathlib import Path
from tolserve.model.build import BuildOptions, build_table
build_table(Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]))
"""


class Stop(Exception):  # noqa: N818 - it is no error
    pass


@pytest.fixture(scope="module")
def model_dir(model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    """Slow enough to be killed half way: some tenths of a second of arithmetic and checksums."""
    return model_dir_of(tiny_config(vocab_size=VOCAB, num_hidden_layers=5, intermediate_size=256))


@pytest.fixture(scope="module")
def whole(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of the tables of builds that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for name, options in OPTIONS.items():
        build_table(model_dir, folder / name, options)
    return {name: contents(folder / name) for name in OPTIONS}


def contents(table: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in table.iterdir()}


def stopping_after(batches: int) -> Callable[[int, int], None]:
    """A progress callback that ends the build after so many batches of records."""

    def progress(done: int, total: int) -> None:
        if done >= total - VOCAB + batches * TOKENS_PER_BATCH and done > total - VOCAB:
            raise Stop

    return progress


@pytest.mark.parametrize("name", OPTIONS)
def test_a_build_goes_on_where_the_last_one_stopped(
    model_dir: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, name: str
) -> None:
    options, out = OPTIONS[name], tmp_path / "tol"
    for batches in (2, 3):
        with pytest.raises(Stop):
            build_table(model_dir, out, options, progress=stopping_after(batches))
        assert not out.exists()
        with pytest.raises(TableError, match="no manifest"):
            Table.open(tmp_path / ".tol.partial")
    seen: list[tuple[int, int]] = []
    build_table(model_dir, out, options, progress=lambda done, total: seen.append((done, total)))
    passes = 2 if options.lowrank else 1
    assert seen[0] == ((passes - 1) * VOCAB + 4 * TOKENS_PER_BATCH, passes * VOCAB), "three batches were kept"
    assert contents(out) == whole[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tol"]


def damage(folder: Path, at_token: int) -> None:
    record_stride = 5 * 32 * 2
    with (folder / "records-00001-of-00001.safetensors").open("r+b") as file:
        file.seek(4096 + at_token * record_stride + 7)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("what", ["damaged", "short", "no checksums", "no records", "no manifest"])
def test_only_what_is_right_is_kept(
    model_dir: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, what: str
) -> None:
    out, partial = tmp_path / "tol", tmp_path / ".tol.partial"
    with pytest.raises(Stop):
        build_table(model_dir, out, progress=stopping_after(4))
    kept = 0
    if what == "damaged":
        damage(partial, at_token=2 * TOKENS_PER_BATCH + 5)
        kept = 2
    elif what == "short":
        os.truncate(partial / "records-00001-of-00001.safetensors", 4096 + 3 * TOKENS_PER_BATCH * 320 + 9)
        kept = 3
    elif what == "no checksums":
        os.truncate(partial / "checksums.safetensors", 5000)
    elif what == "no records":
        (partial / "records-00001-of-00001.safetensors").unlink()
    else:
        (partial / "manifest.coming.json").unlink()
    seen: list[int] = []
    build_table(model_dir, out, progress=lambda done, total: seen.append(done))
    assert seen[0] == (kept + 1) * TOKENS_PER_BATCH
    assert contents(out) == whole["bf16"]


@pytest.mark.parametrize(
    "other", [BuildOptions("int4", 32), BuildOptions(dropped_layers=(4,)), BuildOptions(rank=16), "model"]
)
def test_another_table_at_the_same_place_starts_over(
    model_dir: Path, model_dir_of: Callable[[ModelConfig], Path], tmp_path: Path, other: Any
) -> None:
    with pytest.raises(Stop):
        build_table(model_dir, tmp_path / "tol", progress=stopping_after(4))
    if other == "model":
        other, model_dir = BuildOptions(), model_dir_of(tiny_config(vocab_size=VOCAB, num_hidden_layers=5))
    build_table(model_dir, tmp_path / "whole", other)
    seen: list[int] = []
    build_table(model_dir, tmp_path / "tol", other, progress=lambda done, total: seen.append(done))
    assert seen[0] <= TOKENS_PER_BATCH
    assert contents(tmp_path / "tol") == contents(tmp_path / "whole")


def test_a_second_build_leaves_the_first_ones_empty_folder_alone(model_dir: Path, tmp_path: Path) -> None:
    """A lowrank build writes nothing in its first pass."""

    def second(done: int, total: int) -> None:
        with pytest.raises(TableError, match="another build is writing"):
            build_table(model_dir, tmp_path / "tol")

    build_table(model_dir, tmp_path / "tol", BuildOptions(energy=0.9), progress=second)
    verify(Table.open(tmp_path / "tol"))


def test_verify_looks_at_the_factors_too(model_dir: Path, tmp_path: Path) -> None:
    build_table(model_dir, tmp_path / "tol", BuildOptions(energy=0.9))
    with (tmp_path / "tol" / "factors.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x00\x7f\x11")
    with pytest.raises(TableError, match="factors"):
        verify(Table.open(tmp_path / "tol"))


def test_a_rank_is_taken_as_it_is_or_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(EncodingError, match="multiple of 8, such as 16"):
        build_table(model_dir, tmp_path / "tol", BuildOptions(rank=10))
    build_table(model_dir, tmp_path / "tol", BuildOptions(rank=16))
    assert set(Table.open(tmp_path / "tol").manifest.encoding.ranks or ()) == {16}


def test_two_builds_at_one_place_are_refused(model_dir: Path, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(TableError, match="another build is writing"):
            build_table(model_dir, tmp_path / "tol")
        raise Stop

    with pytest.raises(Stop):
        build_table(model_dir, tmp_path / "tol", progress=second)
    build_table(model_dir, tmp_path / "tol")
    verify(Table.open(tmp_path / "tol"))


def test_an_export_goes_on_as_well(model_dir: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        export(model_dir, tmp_path / "out", progress=stopping_after(4))
    seen: list[int] = []
    export(model_dir, tmp_path / "out", progress=lambda done, total: seen.append(done))
    assert seen[0] == 5 * TOKENS_PER_BATCH
    assert contents(tmp_path / "out" / "tol") == whole["bf16"]


def test_foreign_files_in_the_partial_folder_stay(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / ".tol.partial").mkdir()
    (tmp_path / ".tol.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(TableError, match=r"thesis\.txt"):
        build_table(model_dir, tmp_path / "tol")
    assert (tmp_path / ".tol.partial" / "thesis.txt").exists()


@pytest.mark.parametrize("name", OPTIONS)
def test_killed_builds_end_with_the_same_bytes(
    model_dir: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, name: str
) -> None:
    """SIGKILL at random moments, until a build gets through."""
    out, dice = tmp_path / "tol", random.Random(name)
    command = [sys.executable, "-c", BUILD, str(model_dir), str(out), repr(OPTIONS[name])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = 0
    for _ in range(3):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not (tmp_path / ".tol.partial").exists():
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert out.exists() or process.returncode, "a build that ended well left no table"
        if out.exists():
            break
    assert killed
    if not out.exists():
        build_table(model_dir, out, OPTIONS[name])
    assert contents(out) == whole[name]
