"""`tolserve table build` on a disk that misbehaves, and killed: a whole table at its place or none, and a later build
makes one."""

import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from e2e.conftest import environment, tolserve
from faulty_fs import Fault, Mount
from tiny import tiny_config
from tolserve.model.config import ModelConfig
from tolserve.tol.table import Table, TableError, verify

COUNT: Literal["delay"] = "delay"  # a delay of no time counts the operations


def contents(table: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in table.iterdir()}


@dataclass
class Site:
    """Where a model's table is built through the faulty file system, and what a build without faults makes."""

    model: Path
    mount: Mount
    out: Path  # behind the file system
    right: dict[str, bytes]
    writes: int  # system calls of a build without faults
    syncs: int

    def start(self, *options: str) -> subprocess.Popen[str]:
        argv = tolserve("table", "build", str(self.model), "--out", str(self.mount.at(self.out)), *options)
        return subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def build(self, *options: str) -> None:
        process = self.start(*options)
        said = process.communicate(timeout=110)[1]
        assert process.returncode == 0, said
        assert contents(self.out) == self.right

    def fails(self, fault: Fault, *options: str) -> None:
        """The build ends with one line that says what the system said."""
        injected = self.mount.inject(fault)
        process = self.start(*options)
        said = process.communicate(timeout=110)[1]
        self.mount.clear()
        assert injected.fired >= 1
        assert process.returncode == 1, said
        assert "Traceback" not in said
        (line,) = [line for line in said.splitlines() if line.startswith("tolserve: ")]
        assert os.strerror(fault.code) in line

    def is_killed(self, op: Literal["write", "fsync"], after: int, *options: str) -> None:
        """By SIGKILL, while its operation of that number is on its way."""
        injected = self.mount.inject(Fault(op, "delay", after=after, times=1, seconds=60))
        process = self.start(*options)
        injected.wait()
        process.kill()
        self.mount.clear()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL

    def forget(self) -> None:
        """What an interrupted build left would make the next one's operations fewer; tests/model/test_resume.py has
        builds that go on."""
        shutil.rmtree(self.out.with_name(f".{self.out.name}.partial"), ignore_errors=True)

    def has_no_table(self) -> bool:
        try:
            table = Table.open(self.out)
        except TableError:
            return True
        verify(table)  # raises for one that is half there
        return False


@pytest.fixture(scope="module")
def model(model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    """With a table of about a megabyte, so that its records are many writes."""
    return model_dir_of(tiny_config(hidden_size=256, num_hidden_layers=8))


@pytest.fixture(scope="module")
def _undisturbed(model: Path, _mount: Mount, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(model, _mount, tmp_path_factory.mktemp("whole") / "tol", {}, 0, 0)
    writes, syncs = _mount.inject(Fault("write", COUNT)), _mount.inject(Fault("fsync", COUNT))
    process = site.start()
    said = process.communicate(timeout=110)[1]
    assert process.returncode == 0, said
    assert not site.has_no_table()
    site.right, site.writes, site.syncs = contents(site.out), writes.fired, syncs.fired
    _mount.clear()
    assert site.writes > 4
    assert site.syncs > 2
    return site


@pytest.fixture
def site(_undisturbed: Site, mount: Mount, tmp_path: Path) -> Site:
    whole = _undisturbed
    return Site(whole.model, mount, tmp_path / "tol", whole.right, whole.writes, whole.syncs)


def some(count: int) -> int:
    """Any moment will do, so each run tries others."""
    return random.SystemRandom().randrange(count)


def test_a_build_that_is_cut_off_leaves_no_table_and_the_next_one_makes_it(site: Site) -> None:
    moment = some(site.writes)
    site.fails(Fault("write", "error", after=moment, code=errno.ENOSPC))
    assert site.has_no_table(), f"no room at write {moment}"
    site.forget()
    moment = some(site.writes)
    site.is_killed("write", moment)
    assert site.has_no_table(), f"killed at write {moment}"
    site.build()


def test_a_build_that_is_to_replace_a_table_and_fails_leaves_the_old_one(site: Site) -> None:
    site.out.mkdir()
    for name, data in site.right.items():
        (site.out / name).write_bytes(data)
    moment = some(site.writes)
    site.fails(Fault("write", "error", after=moment), "--force")
    assert contents(site.out) == site.right, f"I/O error at write {moment}"
    site.forget()
    moment = some(site.syncs)
    site.fails(Fault("fsync", "error", after=moment), "--force")
    assert contents(site.out) == site.right, f"I/O error at fsync {moment}"


def test_a_build_that_is_killed_while_it_syncs_leaves_all_or_nothing(site: Site) -> None:
    moment = some(site.syncs)
    site.is_killed("fsync", moment)
    if site.has_no_table():
        site.build()
    else:
        assert contents(site.out) == site.right, f"killed at fsync {moment}"
