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
from tolserve.tol.disk import DiskSource, Read, ReadRequest
from tolserve.tol.disk.aio import AsyncReader
from tolserve.tol.disk.reads import Deliver
from tolserve.tol.manifest import Group
from tolserve.tol.table import Bytes, RecordError, Table, TableError

# How bytes come: by asynchronous reads, by the pool beside them, by the pool alone.
WAYS = {"asynchronous": ("direct", False), "background": ("direct", True), "buffered": ("buffered", False)}
ways = pytest.mark.parametrize(("io", "background"), WAYS.values(), ids=WAYS)


def request(token: int, deliver: Deliver = np.copy, groups: range = range(1), background: bool = False) -> ReadRequest:
    return ReadRequest(token, groups, deliver, background)


def read_one(source: DiskSource, token: int, deliver: Deliver = np.copy, background: bool = False) -> Read:
    source.submit([request(token, deliver, background=background)])
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
@ways
@pytest.mark.parametrize("depth", [1, 8])
def test_every_record_arrives_as_written(tmp_path: Path, shape: str, io: str, background: bool, depth: int) -> None:
    table, records = make_table(tmp_path / "t", 50, shape, shard_bytes=100_000)
    source = DiskSource(table, io, depth)
    source.submit([request(token, background=background) for token in range(50)])
    reads = read_all(source, 50)
    assert 1 <= source.peak_outstanding <= depth
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
@ways
def test_consecutive_groups_arrive_as_one_range_of_bytes(tmp_path: Path, shape: str, io: str, background: bool) -> None:
    table, records = grouped(tmp_path / "t", shape, 10, 3)
    source = DiskSource(table, io)
    ranges = [range(first, last) for first in range(3) for last in range(first + 1, 4)]
    source.submit([request(token, groups=groups, background=background) for token in range(10) for groups in ranges])
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


def test_threads_check_and_deliver_at_the_same_time(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    source = DiskSource(table, "buffered", depth=4)
    together = threading.Barrier(4, timeout=30)  # breaks, and fails the reads, unless four of them meet
    source.submit([request(token, lambda payload: together.wait()) for token in range(4)])
    assert sorted(read.delivered for read in read_all(source, 4)) == [0, 1, 2, 3]
    assert source.peak_outstanding == 4
    source.close()


def test_asynchronous_reads_start_at_once_and_are_delivered_by_the_caller(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40)
    source = DiskSource(table, depth=16)
    delivered: list[int] = []

    def deliver(payload: Bytes) -> int:
        delivered.append(payload.size)
        return threading.get_ident()

    source.submit([request(token, deliver) for token in range(40)])
    assert source.peak_outstanding == 16
    time.sleep(0.05)
    assert delivered == []
    assert {read.delivered for read in read_all(source, 40)} == {threading.get_ident()}
    assert source.peak_outstanding == 16
    source.close()


def test_background_reads_arrive_while_nobody_asks(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40)
    source = DiskSource(table, depth=4)
    delivered = threading.Semaphore(0)
    source.submit([request(token, lambda payload: delivered.release(), background=True) for token in range(40)])
    for _ in range(40):
        assert delivered.acquire(timeout=30)
    assert len(read_all(source, 40)) == 40
    source.close()


@pytest.mark.parametrize("block", [True, False])
def test_reads_by_both_ways_are_told_once_each(tmp_path: Path, block: bool) -> None:
    table, records = make_table(tmp_path / "t", 40)
    source = DiskSource(table, depth=2)
    source.submit([request(token, background=token % 3 == 0) for token in range(40)])
    reads: list[Read] = []
    while len(reads) < 40:
        more = source.finished(block)
        assert more or not block
        reads += more
    assert sorted(read.token for read in reads) == list(range(40))
    assert all(np.array_equal(read.delivered, records[read.token]) for read in reads)
    with pytest.raises(RuntimeError, match="no read is on its way"):
        source.finished(block=True)
    source.close()


@pytest.mark.parametrize("refusal", [PermissionError, OSError])
def test_the_pool_reads_everything_where_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: type[OSError]
) -> None:
    """As in a container whose filter knows no io_setup, or where other programs took fs.aio-max-nr."""

    def refuse(*_: object, **__: object) -> None:
        raise refusal(1, "refused")

    monkeypatch.setattr(AsyncReader, "__init__", refuse)
    table, records = make_table(tmp_path / "t", 40)
    source = DiskSource(table)
    assert "by threads" in source.describe()
    source.submit([request(token) for token in range(40)])
    for read in read_all(source, 40):
        assert np.array_equal(read.delivered, records[read.token])
    source.close()


@ways
def test_a_fault_is_tried_again_and_then_told(tmp_path: Path, io: str, background: bool) -> None:
    table, _ = make_table(tmp_path / "t", 40, "page")
    source = DiskSource(table, io)
    flip_byte(table, 3)
    delivered: list[int] = []
    read = read_one(source, 3, lambda payload: delivered.append(3), background)
    assert read.error is not None
    assert (read.error.kind, read.error.token, read.failures) == ("checksum", 3, ("checksum", "checksum"))
    path, offset = shard_file(table, 20)
    os.truncate(path, offset + 4095)
    read = read_one(source, 20, lambda payload: delivered.append(20), background)
    assert read.error is not None
    assert read.failures == ("short", "short")
    assert delivered == []
    source.close()


@ways
def test_an_error_of_the_system_is_one_of_the_record(tmp_path: Path, io: str, background: bool) -> None:
    table, records = make_table(tmp_path / "t", 40)
    source = DiskSource(table, io)
    # The descriptor now leads to a folder, which cannot be read.
    held = os.dup(source._fds[0])
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, source._fds[0])
    source.submit([request(token, background=background) for token in range(4)])
    for read in read_all(source, 4):
        assert read.error is not None
        assert read.failures == ("io", "io")
        assert "directory" in str(read.error) or "Invalid argument" in str(read.error)
    os.dup2(held, source._fds[0])
    assert np.array_equal(read_one(source, 1, background=background).delivered, records[1])
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


@ways
def test_a_passing_fault_is_counted_and_forgiven(tmp_path: Path, io: str, background: bool) -> None:
    _, records = make_table(tmp_path / "t", 4, "page")
    table = HealingTable.open(tmp_path / "t")
    source = DiskSource(table, io)
    flip_byte(table, 2)
    read = read_one(source, 2, background=background)
    assert read.error is None
    assert np.array_equal(read.delivered, records[2])
    assert read.failures == ("checksum",)
    assert read.bytes == 2 * 4096
    source.close()


@ways
def test_an_exception_of_the_delivery_is_handed_over(tmp_path: Path, io: str, background: bool) -> None:
    table, _ = make_table(tmp_path / "t")
    source = DiskSource(table, io, depth=1)

    def fail(payload: Bytes) -> None:
        raise MemoryError("no room")

    read = read_one(source, 0, fail, background)
    assert isinstance(read.fault, MemoryError)
    assert read.delivered is None
    assert read_one(source, 0, background=background).delivered.size == 1536  # the next one is none the worse
    source.close()


@ways
def test_closing_fails_what_is_queued_and_gives_back_every_descriptor(
    tmp_path: Path, io: str, background: bool
) -> None:
    table, records = make_table(tmp_path / "t", 40, shard_bytes=6000)
    before = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    source = DiskSource(table, io, depth=1)
    assert len(os.listdir("/proc/self/fd")) == before + len(table.manifest.shards)
    first = threading.Event()

    def slow(payload: Bytes) -> Bytes:
        first.set()
        time.sleep(0.2)
        return payload.copy()

    source.submit([request(0, slow, background=background), *(request(t, background=background) for t in (1, 2, 3))])
    if WAYS["asynchronous"] != (io, background):
        assert first.wait(30)
    source.close()
    source.close()
    reads = sorted(source.finished(block=False), key=lambda read: read.token)
    assert [read.token for read in reads] == [0, 1, 2, 3]
    assert np.array_equal(reads[0].delivered, records[0])
    assert all(read.error is not None and "closed" in str(read.error) for read in reads[1:])
    assert len(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="closed"):
        source.submit([request(1)])
    (table.path / table.manifest.shards[-1].file).unlink()
    with pytest.raises(TableError, match="cannot be read"):
        DiskSource(table, io)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_share_in_the_page_cache_is_told(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 2000, "page", shard_bytes=3 << 20)
    files = [table.path / shard.file for shard in table.manifest.shards]
    assert len(files) == 3
    source = DiskSource(table, "buffered")

    def forget() -> None:
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    forget()
    assert source.cached_share() == 0.0
    files[0].read_bytes()
    assert source.cached_share() == pytest.approx(
        files[0].stat().st_size / sum(f.stat().st_size for f in files), abs=0.01
    )
    for file in files:
        file.read_bytes()
    assert source.cached_share() == 1.0
    assert "100% of the table" in source.describe()
    source.close()


@pytest.mark.parametrize(("io", "depth"), [("mmap", 1), ("direct", 0)])
def test_unknown_ways_of_reading_are_refused(tmp_path: Path, io: str, depth: int) -> None:
    table, _ = make_table(tmp_path / "t")
    with pytest.raises(ValueError, match=r"io is|depth is"):
        DiskSource(table, io, depth)
