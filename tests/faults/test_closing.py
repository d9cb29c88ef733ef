"""Closing the disk tier while a read hangs: it ends in time, tells of every read, and never delivers a late one."""

import time
from pathlib import Path

import pytest

from faulty_fs import Fault, Mount
from tol.tables import make_table, shard_file
from tolserve.tol.disk import DiskSource, ReadRequest
from tolserve.tol.table import Bytes, Table

HANGING = 13


@pytest.mark.parametrize(
    ("io", "background"),
    [("direct", False), ("direct", True), ("buffered", False)],
    ids=["asynchronous", "background", "buffered"],
)
def test_a_read_that_hangs_is_given_up_and_never_delivered(
    mount: Mount, tmp_path: Path, io: str, background: bool
) -> None:
    table, _ = make_table(tmp_path / "t", 40, "page")
    file, first = shard_file(table, HANGING)
    source = DiskSource(Table.open(mount.at(table.path)), io)
    hanging = mount.inject(Fault("read", "delay", file.name, first, first + 4096, seconds=60.0))
    delivered: list[int] = []

    def request(token: int) -> ReadRequest:
        def deliver(payload: Bytes) -> None:
            delivered.append(token)

        return ReadRequest(token, range(len(table.manifest.groups)), deliver, background)

    source.submit([request(token) for token in (3, HANGING, 30)])
    hanging.wait()
    started = time.monotonic()
    source.close(patience=0.5)
    assert 0.4 < time.monotonic() - started < 1.5
    reads = source.finished(block=False)
    assert sorted(read.token for read in reads) == [3, HANGING, 30]
    failed = {read.token: str(read.error) for read in reads if read.error is not None}
    assert "still being read" in failed[HANGING]
    assert set(delivered) == {3, HANGING, 30} - failed.keys()
    mount.clear()  # the read ends now
    time.sleep(0.3)
    assert HANGING not in delivered
    assert source.finished(block=False) == []
