"""The paging core over a disk that misbehaves: every fault is a real answer to a real system call."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faulty_fs import Fault, Injected, Mount, MountOver
from tol.tables import Records, assert_bytes, make_table, open_pager, shard_file, value
from tolserve.metrics import Metrics
from tolserve.tol.pager import Pager, RecordsUnavailable
from tolserve.tol.table import RecordError, Table, TableError

V = 40
BAD = 13
FINE = [3, 12, 14, 30]  # neighbours in the file among them
SHARD = "records-00001-of-00001.safetensors"


def over(table: Table, fault: Fault, token: int = BAD) -> Fault:
    """The fault, narrowed to a record's bytes."""
    file, first = shard_file(table, token)
    return replace(fault, file=file.name, first=first, last=first + table.manifest.record_bytes)


@dataclass
class Bench:
    """A pager of ten slots over a table that is read through a faulty file system."""

    folder: Path  # the table's, behind the file system
    mount: Mount
    table: Table
    records: Records
    pager: Pager
    metrics: Metrics

    def inject(self, fault: Fault, token: int = BAD) -> Injected:
        return self.mount.inject(over(self.table, fault, token))

    def errors(self, kind: str) -> float:
        assert value(self.metrics, "tol_read_errors_total") == value(self.metrics, "tol_read_errors_total", kind)
        return value(self.metrics, "tol_read_errors_total", kind)

    def read(self, *tokens: int) -> float:
        """Seconds that a step of these tokens waited; every record is compared byte for byte."""
        lease = self.pager.acquire(tokens)
        try:
            waited = lease.wait()
            assert_bytes(self.pager, lease, self.records)
        finally:
            self.pager.release(lease)
            self.pager.check()
        return waited

    def refused(self, *tokens: int) -> RecordsUnavailable:
        with pytest.raises(RecordsUnavailable) as caught:
            self.read(*tokens)
        return caught.value


@contextmanager
def open_bench(mount: Mount, folder: Path, slots: int = 10, host_slots: int = 0, **options: Any) -> Iterator[Bench]:
    """Over a new table in `folder`."""
    _, records = make_table(folder, V, "page")
    table = Table.open(mount.at(folder))
    with open_pager(table, slots, host_slots, **options) as (pager, metrics):
        yield Bench(folder, mount, table, records, pager, metrics)
        mount.clear()


@pytest.fixture(params=["direct", "buffered"])
def bench(request: pytest.FixtureRequest, mount: Mount, tmp_path: Path) -> Iterator[Bench]:
    with open_bench(mount, tmp_path / "t", io=request.param) as each:
        assert each.pager.disk.io == request.param
        yield each


FAULTS = {
    "io": Fault("read", "error"),
    "short": Fault("read", "short"),
    "checksum": Fault("read", "corrupt"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_passes_is_read_again(bench: Bench, kind: str) -> None:
    fault = bench.inject(replace(FAULTS[kind], times=1))
    bench.read(BAD, *FINE)
    assert fault.fired == 1
    assert bench.errors(kind) == 1
    assert value(bench.metrics, "tol_fills_total") == 1 + len(FINE)


@pytest.mark.parametrize("kind", FAULTS)
def test_what_stays_fails_the_step_and_names_the_record_until_it_is_gone(bench: Bench, kind: str) -> None:
    fault = bench.inject(FAULTS[kind])
    for _ in range(2):
        error = bench.refused(BAD, *FINE)
        assert list(error.errors) == [BAD]
        assert error.errors[BAD].kind == kind
        assert str(error).startswith(f"record of token {BAD}: ")
        bench.read(*FINE)
    assert fault.fired >= 4  # each of the two was tried twice
    assert bench.errors(kind) == fault.fired
    bench.mount.clear()
    bench.read(BAD, *FINE)
    assert bench.errors(kind) == fault.fired


def test_an_error_says_what_the_system_said(bench: Bench) -> None:
    fault = bench.inject(replace(FAULTS["io"], code=errno.ESTALE))  # a network file system whose server forgot the file
    assert os.strerror(errno.ESTALE) in str(bench.refused(BAD))
    assert bench.errors("io") == fault.fired > 0


def test_a_slow_read_is_waited_for_and_counted(bench: Bench) -> None:
    fault = bench.inject(Fault("read", "delay", times=1, seconds=0.5))
    waited = bench.read(BAD, *FINE)
    assert fault.fired == 1
    assert waited > 0.4
    assert value(bench.metrics, "tol_stall_seconds_total") == pytest.approx(waited)
    assert value(bench.metrics, "tol_stalled_steps_total") == 1
    assert bench.errors("io") == 0


def test_a_slow_read_holds_up_nobody_who_does_not_need_it(bench: Bench) -> None:
    fault = bench.inject(Fault("read", "delay", times=1, seconds=60.0))
    assert bench.pager.prefetch([BAD]) == 1
    fault.wait()
    for token in range(20, 40):  # through every slot but the one that the slow read has
        bench.read(token)
    lease = bench.pager.acquire([BAD])
    assert BAD not in lease.hits
    bench.mount.clear()
    lease.wait()
    assert_bytes(bench.pager, lease, bench.records)
    bench.pager.release(lease)
    assert value(bench.metrics, "tol_misses_total", "inflight") == 1


def test_a_file_that_is_cut_off_under_the_pager_loses_what_lies_beyond(bench: Bench) -> None:
    bench.read(*FINE)
    behind = bench.folder / SHARD
    whole = behind.read_bytes()
    os.truncate(behind, shard_file(bench.table, BAD)[1])
    error = bench.refused(BAD, 2)
    assert error.errors[BAD].kind == "short"
    assert bench.errors("short") >= 2
    bench.read(*FINE)  # a hit needs no disk
    bench.read(2)
    with behind.open("r+b") as file:
        file.write(whole)
    bench.read(BAD)


def test_a_file_that_is_removed_under_the_pager_is_read_on(bench: Bench) -> None:
    bench.read(*FINE)
    (bench.table.path / SHARD).unlink()
    assert not (bench.folder / SHARD).exists()
    bench.read(BAD, 2, 7)
    assert value(bench.metrics, "tol_read_errors_total") == 0


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_file_system_that_goes_away_leaves_what_is_cached(mount_over: MountOver, tmp_path: Path, io: str) -> None:
    with open_bench(mount_over(tmp_path), tmp_path / "t", io=io) as bench:
        bench.read(*FINE)
        bench.mount.die()
        error = bench.refused(BAD, *FINE)
        assert list(error.errors) == [BAD]
        assert os.strerror(errno.ENOTCONN) in str(error) or os.strerror(errno.ECONNABORTED) in str(error)
        assert bench.errors("io") >= 2
        bench.read(*FINE)


@pytest.mark.parametrize("kept", [V, V - 4])
def test_records_in_the_host_tier_outlive_the_disk(mount_over: MountOver, tmp_path: Path, kept: int) -> None:
    """In a whole table, which is read at the start, and in a bounded tier."""
    with open_bench(mount_over(tmp_path), tmp_path / "t", 4, kept) as bench:
        for token in range(kept):
            bench.read(token)
        bench.mount.die()
        for token in range(kept):
            bench.read(token)
        assert value(bench.metrics, "tol_read_errors_total") == 0


def test_where_direct_reads_are_refused_they_are_buffered(mount_over: MountOver, tmp_path: Path) -> None:
    with open_bench(mount_over(tmp_path, "refuses direct"), tmp_path / "t", io="direct") as bench:
        assert bench.pager.disk.io == "buffered"
        fault = bench.inject(replace(FAULTS["io"], times=1))
        bench.read(BAD, *FINE)
        assert fault.fired == bench.errors("io") == 1


def test_wrong_bytes_in_the_page_cache_are_read_again_from_below_it(mount_over: MountOver, tmp_path: Path) -> None:
    with open_bench(mount_over(tmp_path, "page cache"), tmp_path / "t", io="buffered") as bench:
        fault = bench.inject(replace(FAULTS["checksum"], times=1))
        bench.read(BAD)
        assert fault.fired == bench.errors("checksum") == 1


# Opening -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "t"
    make_table(folder, V, "page")
    return folder


@pytest.mark.parametrize("file", ["manifest.json", SHARD, "checksums.safetensors"])
@pytest.mark.parametrize("op", ["open", "read"])
def test_an_error_at_the_opening_names_the_file(mount: Mount, intact: Path, file: str, op: Any) -> None:
    fault = mount.inject(Fault(op, "error", file))
    with pytest.raises(TableError, match=f"{file} cannot be read: .*{os.strerror(errno.EIO)}"):
        Table.open(mount.at(intact))
    assert fault.fired == 1
    mount.clear()
    Table.open(mount.at(intact))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_whole_table_in_host_memory_has_no_hole(mount: Mount, tmp_path: Path, kind: str) -> None:
    make_table(tmp_path / "t", V, "page")
    table = Table.open(mount.at(tmp_path / "t"))
    fault = mount.inject(over(table, FAULTS[kind]))
    with pytest.raises(RecordError, match=f"record of token {BAD}: "), open_pager(table, 4, V):
        pass
    assert fault.fired >= 2
    mount.clear()
    with open_pager(table, 4, V):
        pass


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_an_error_when_the_shards_are_opened_names_the_file(mount: Mount, intact: Path, io: str) -> None:
    table = Table.open(mount.at(intact))
    before = len(os.listdir("/proc/self/fd"))
    fault = mount.inject(Fault("open", "error", SHARD))
    expected = pytest.raises(TableError, match=f"{SHARD} cannot be read: .*{os.strerror(errno.EIO)}")
    with expected, open_pager(table, 4, io=io):
        pass
    assert fault.fired == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_bad_record_keeps_no_server_from_starting(mount: Mount, tmp_path: Path) -> None:
    """Not even the first one, whose page shows whether the file system reads directly."""
    make_table(tmp_path / "t", V, "page")
    fault = mount.inject(over(Table.open(tmp_path / "t"), FAULTS["io"], 0))
    with open_bench(mount, tmp_path / "t", V, io="direct") as bench:
        assert bench.pager.disk.io == "direct"
        bench.pager.preload()
        assert value(bench.metrics, "tol_fills_total", "disk", "preload") == V - 1
        assert bench.errors("io") >= 2
        assert fault.fired == bench.errors("io") + 1
        bench.read(*range(1, V))
        mount.clear()
        bench.read(0)


@pytest.mark.parametrize(
    ("file", "first", "last"), [("manifest.json", 0, 1 << 62), (SHARD, 0, 1000), ("checksums.safetensors", 0, 1000)]
)
def test_wrong_bytes_where_the_table_describes_itself(
    mount: Mount, intact: Path, file: str, first: int, last: int
) -> None:
    fault = mount.inject(Fault("read", "corrupt", file, first, last))
    with pytest.raises(TableError, match=file):
        Table.open(mount.at(intact))
    assert fault.fired > 0


def test_wrong_checksums_fail_records_and_serve_none(mount: Mount, tmp_path: Path) -> None:
    """Every record disagrees then: nothing is served, rather than something wrong."""
    make_table(tmp_path / "t", V, "page")
    fault = mount.inject(Fault("read", "corrupt", "checksums.safetensors", 4096))
    table = Table.open(mount.at(tmp_path / "t"))
    assert fault.fired > 0
    with open_pager(table, 4) as (pager, metrics):
        lease = pager.acquire([BAD])
        with pytest.raises(RecordsUnavailable, match="checksum does not match"):
            lease.wait()
        pager.release(lease)
        assert value(metrics, "tol_read_errors_total", "checksum") >= 2


def cut(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def exchange(folder: Path) -> None:
    """The shard of a table with another fingerprint."""
    shard = (folder / SHARD).read_bytes()
    assert b"f" * 32 in shard[:4096]
    (folder / SHARD).write_bytes(shard.replace(b"f" * 32, b"e" * 32, 1))


def remove(folder: Path) -> None:
    (folder / SHARD).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "is 167935 bytes long; its header describes 167936"),
        (exchange, "is a shard of another table"),
        (remove, "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, intact: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(intact, tmp_path / "t")
    damage(folder)
    with pytest.raises(TableError, match=f"{SHARD} {message}"):
        Table.open(folder)


def test_a_shard_that_is_written_over_while_it_is_open_is_noticed_by_each_record(bench: Bench) -> None:
    """Its records are good ones, each in another's place."""
    with (bench.folder / SHARD).open("r+b") as file:
        file.seek(shard_file(bench.table, 0)[1])
        file.write(np.roll(bench.records, 1, axis=0).tobytes())
    assert bench.refused(BAD, *FINE).errors.keys() == {BAD, *FINE}
    assert bench.errors("checksum") >= 2 * (1 + len(FINE))
