"""Reading records from disk: the same bytes however they are read, several at once, and every fault named."""

import itertools
import os
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tol.tables import SHAPES, Records, flip_byte, make_table, shard_file
from tolserve.tol.disk import Deliver, DiskSource, Read, ReadRequest
from tolserve.tol.manifest import Group
from tolserve.tol.table import Bytes, RecordError, Table


def request(token: int, deliver: Deliver = np.copy, groups: range = range(1)) -> ReadRequest:
    return ReadRequest(token, groups, deliver)


def read_one(source: DiskSource, token: int, deliver: Deliver = np.copy) -> Read:
    source.submit([request(token, deliver)])
    (read,) = source.finished(block=True)
    assert read.token == token
    assert source.finished(block=False) == []
    return read


def read_all(source: DiskSource, count: int) -> list[Read]:
    reads: list[Read] = []
    while len(reads) < count:
        reads += source.finished(block=True)
    assert source.finished(block=False) == []
    return reads


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("depth", [1, 8])
def test_every_record_arrives_as_written(tmp_path: Path, shape: str, io: str, depth: int) -> None:
    table, records = make_table(tmp_path / "t", 50, shape, shard_bytes=100_000)
    source = DiskSource(table, io, depth)
    source.submit([request(token) for token in range(50)])
    reads = read_all(source, 50)
    source.close()
    pages = set()
    for read in reads:
        assert read.error is None
        assert read.fault is None
        assert read.failures == ()
        assert read.seconds > 0
        assert np.array_equal(read.delivered, records[read.token])
        if read.bytes % 4096 == 0:  # all but a packed record at the end of its file
            pages.add(read.bytes // 4096)
    assert sorted(read.token for read in reads) == list(range(50))
    assert pages == {"page": {1}, "padded": {2}, "packed": {1, 2}}[shape]


def grouped(path: Path, shape: str, vocab_size: int, groups: int) -> tuple[Table, Records]:
    """A table whose records have this many groups of one layer or more, and the records."""
    table, records = make_table(path, vocab_size, shape)
    manifest = table.manifest
    bounds = [len(manifest.layers) * index // groups for index in range(groups + 1)]
    row = manifest.record_bytes // len(manifest.layers)
    parts = tuple(
        Group(manifest.layers[first:last], first * row, (last - first) * row)
        for first, last in itertools.pairwise(bounds)
    )
    checksums = [
        [zlib.crc32(record[part.offset : part.offset + part.bytes].data, token) for part in parts]
        for token, record in enumerate(records)
    ]
    return Table(path, replace(manifest, groups=parts), np.array(checksums, np.uint32)), records


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_consecutive_groups_arrive_as_one_range_of_bytes(tmp_path: Path, shape: str, io: str) -> None:
    table, records = grouped(tmp_path / "t", shape, 10, 3)
    source = DiskSource(table, io)
    ranges = [range(first, last) for first in range(3) for last in range(first + 1, 4)]
    source.submit([request(token, groups=groups) for token in range(10) for groups in ranges])
    reads = read_all(source, 10 * len(ranges))
    assert len({(read.token, read.groups) for read in reads}) == 10 * len(ranges)
    parts = table.manifest.groups
    for read in reads:
        first, last = parts[read.groups.start], parts[read.groups.stop - 1]
        expected = records[read.token, first.offset : last.offset + last.bytes]
        assert np.array_equal(read.delivered, expected)
        covering = -(-(expected.size + 4095) // 4096) * 4096
        assert expected.size <= read.bytes <= covering + 4096
    flip_byte(table, 7, at=parts[1].offset)
    for groups in ranges:
        source.submit([request(7, groups=groups)])
        (read,) = source.finished(block=True)
        assert (read.error is not None) == (1 in groups)
    for groups in (range(0), range(2, 4), range(0, 3, 2), range(-1, 1)):
        with pytest.raises(ValueError, match="no consecutive groups"):
            source.submit([request(0), request(0, groups=groups)])
    assert source.finished(block=False) == []
    source.close()


def test_direct_reads_are_direct_where_the_file_system_allows_it(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    path, _ = shard_file(table, 0)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        allowed = "direct"
    except OSError:
        allowed = "buffered"
    for asked, expected in (("direct", allowed), ("buffered", "buffered")):
        source = DiskSource(table, asked)
        assert source.io == expected
        source.close()


def test_reads_run_at_the_same_time(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    source = DiskSource(table, depth=4)
    together = threading.Barrier(4, timeout=30)  # breaks, and fails the reads, unless four of them meet
    source.submit([request(token, lambda payload: together.wait()) for token in range(4)])
    assert sorted(read.delivered for read in read_all(source, 4)) == [0, 1, 2, 3]
    assert source.peak_outstanding == 4
    source.close()


def test_a_fault_is_tried_again_and_then_told(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40, "page")
    source = DiskSource(table)
    flip_byte(table, 3)
    delivered: list[int] = []
    read = read_one(source, 3, lambda payload: delivered.append(3))
    assert read.error is not None
    assert (read.error.kind, read.error.token, read.failures) == ("checksum", 3, ("checksum", "checksum"))
    path, offset = shard_file(table, 20)
    os.truncate(path, offset + 4095)
    read = read_one(source, 20, lambda payload: delivered.append(20))
    assert read.error is not None
    assert read.failures == ("short", "short")
    assert delivered == []
    source.close()


def test_an_error_of_the_system_is_one_of_the_record(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", 40)
    source = DiskSource(table)
    # The descriptor now leads to a folder, and reading one is EISDIR.
    held = os.dup(source._fds[0])
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, source._fds[0])
    read = read_one(source, 1)
    assert read.error is not None
    assert read.failures == ("io", "io")
    assert "directory" in str(read.error)
    os.dup2(held, source._fds[0])
    assert np.array_equal(read_one(source, 1).delivered, records[1])
    source.close()
    os.close(held)
    os.close(folder)


class HealingTable(Table):
    """Puts a damaged byte right as soon as the damage was noticed."""

    def check(self, token: int, payload: Bytes, groups: range | None = None) -> None:
        try:
            super().check(token, payload, groups)
        except RecordError:
            flip_byte(self, token)
            raise


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_passing_fault_is_counted_and_forgiven(tmp_path: Path, io: str) -> None:
    _, records = make_table(tmp_path / "t", 4, "page")
    table = HealingTable.open(tmp_path / "t")
    source = DiskSource(table, io)
    flip_byte(table, 2)
    read = read_one(source, 2)
    assert read.error is None
    assert np.array_equal(read.delivered, records[2])
    assert read.failures == ("checksum",)
    assert read.bytes == 2 * 4096
    source.close()


def test_an_exception_of_the_delivery_is_handed_over(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    source = DiskSource(table, depth=1)

    def fail(payload: Bytes) -> None:
        raise MemoryError("no room")

    read = read_one(source, 0, fail)
    assert isinstance(read.fault, MemoryError)
    assert read.delivered is None
    assert read_one(source, 0).delivered.size == 1536  # the thread lives
    source.close()


def test_closing_fails_what_is_queued_and_gives_back_every_descriptor(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40, shard_bytes=6000)
    before = len(os.listdir("/proc/self/fd"))
    source = DiskSource(table, depth=1)
    assert len(os.listdir("/proc/self/fd")) == before + len(table.manifest.shards)

    def until_closing(payload: Bytes) -> None:
        while not source._closing:
            time.sleep(0.001)

    source.submit([request(0, until_closing), *(request(token) for token in (1, 2, 3))])
    source.close()
    source.close()
    reads = source.finished(block=False)
    assert [read.token for read in reads] == [0, 1, 2, 3]
    assert all(read.error is not None and "closed" in str(read.error) for read in reads[1:])
    assert len(os.listdir("/proc/self/fd")) == before
    (table.path / table.manifest.shards[-1].file).unlink()
    with pytest.raises(FileNotFoundError):
        DiskSource(table)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("io", "depth"), [("mmap", 1), ("direct", 0)])
def test_unknown_ways_of_reading_are_refused(tmp_path: Path, io: str, depth: int) -> None:
    table, _ = make_table(tmp_path / "t")
    with pytest.raises(ValueError, match=r"io is|depth is"):
        DiskSource(table, io, depth)
