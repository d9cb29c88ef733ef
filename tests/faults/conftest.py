"""File systems that break on demand (tests/faulty_fs.py), mounted over folders of the tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.conftest import model_dir, start_server
from faulty_fs import Mount, MountOver, Way

__all__ = ["model_dir", "start_server"]  # fixtures, used by name


@pytest.fixture(scope="session")
def fuse(tool: Callable[[str], str]) -> None:
    """Skips where this user can mount no FUSE file system. A missing program can be installed, and fails under
    --require-tools; a device that the kernel or a container keeps back cannot."""
    tool("fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this test mounts a FUSE file system, and /dev/fuse is missing or closed to this user")


@pytest.fixture(scope="session")
def _mount(fuse: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    base = tmp_path_factory.getbasetemp()
    mount = Mount(base, base / "faulty", base / "faulty.control")
    yield mount
    mount.close()


@pytest.fixture
def mount(_mount: Mount) -> Iterator[Mount]:
    """All temporary folders, through a file system whose faults are off before and after each test."""
    yield _mount
    _mount.clear()


@pytest.fixture
def mount_over(fuse: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountOver]:
    """`mount_over(folder, way)`: a file system of the test's own."""
    mounts: list[Mount] = []

    def start(folder: Path, way: Way = "uncached") -> Mount:
        base = tmp_path_factory.mktemp("m")
        mounts.append(Mount(folder, base / "on", base / "control", way))
        return mounts[-1]

    yield start
    for each in mounts:
        each.close()
