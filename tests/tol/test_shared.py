"""A whole table in shared memory: one copy per host, complete or absent, gone with the last process."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tol.tables import assert_bytes, flip_byte, make_table, open_pager, value
from tolserve.tol.disk import DiskSource
from tolserve.tol.shared import WholeTable
from tolserve.tol.table import RecordError, Table

VOCAB = 40


def shared_files() -> set[Path]:
    return set(Path("/dev/shm").glob(f"tolserve-{os.getuid()}-*"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = shared_files()
    yield
    assert shared_files() <= before


def whole(table: Table) -> WholeTable:
    disk = DiskSource(table)
    try:
        return WholeTable(table, disk, "cpu")
    finally:
        disk.close()


def test_it_holds_every_record_and_goes_with_its_last_user(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", VOCAB, "padded")
    first, second = whole(table), whole(table)
    path = first.path
    assert path.stat().st_size == records.size
    assert path.stat().st_mode & 0o777 == 0o400
    for token in range(VOCAB):
        assert np.array_equal(first.lend(token), records[token])
        assert np.shares_memory(first.lend(token), first.lend(token))
        assert np.array_equal(second.lend(token), records[token])
    with pytest.raises(ValueError, match="read-only"):
        first.lend(0)[:] = 0
    first.close()
    assert path.exists()
    assert np.array_equal(second.lend(7), records[7])
    second.close()
    second.close()
    assert not path.exists()


CHILD = """
    import sys, time
    from pathlib import Path
    from tolserve.tol.disk import DiskSource
    from tolserve.tol.shared import WholeTable
    from tolserve.tol.table import Table
    table = Table.open(Path(sys.argv[1]))
    disk = DiskSource(table)
    whole = WholeTable(table, disk, "cpu")
    print(disk.peak_outstanding, flush=True)
    sys.stdin.readline()
    disk.close()
    whole.close()
"""


def child(table: Table) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(table.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_another_process_maps_it_and_reads_nothing(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", VOCAB)
    mine = whole(table)
    with child(table) as other:
        assert line(other) == "0"
        mine.close()  # the other one still uses it
        assert len(shared_files()) > 0
        again = whole(table)
        assert np.array_equal(again.lend(3), records[3])
        again.close()
        other.communicate("\n")


def test_what_a_killed_process_left_is_used_or_deleted(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", VOCAB)
    other_table, _ = make_table(tmp_path / "other", VOCAB + 1)
    before = shared_files()
    with child(table) as victim:
        assert int(line(victim)) > 0
        victim.send_signal(signal.SIGKILL)
    (left,) = shared_files() - before
    with child(table) as heir:
        assert line(heir) == "0"  # it read nothing
        heir.send_signal(signal.SIGKILL)
    another = whole(other_table)
    assert not left.exists()
    another.close()
    fresh = whole(table)
    assert np.array_equal(fresh.lend(3), records[3])
    fresh.close()


def test_an_incomplete_one_is_read_again(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", VOCAB)
    first = whole(table)
    path = first.path
    first.close()
    path.write_bytes(b"cut off")  # as a process leaves it that is killed while it loads
    path.chmod(0o600)
    again = whole(table)
    assert np.array_equal(again.lend(VOCAB - 1), records[VOCAB - 1])
    again.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", VOCAB)
    first = whole(table)
    path = first.path
    first.close()
    path.write_bytes(bytes(records.size))
    path.chmod(0o444)
    os.chown(path, 65534, 65534)
    try:
        with pytest.raises(MemoryError, match="another user"):
            whole(table)
        other, _ = make_table(tmp_path / "other", VOCAB + 1)
        whole(other).close()  # and it stops nobody else
        assert path.exists()
    finally:
        path.unlink()


def test_those_who_wait_for_a_loader_that_dies_load_it_themselves(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", VOCAB)
    first = whole(table)
    path = first.path
    first.close()
    path.touch(0o600)
    with path.open("rb") as dying:
        fcntl.flock(dying, fcntl.LOCK_EX)
        children = [child(table) for _ in range(3)]
        time.sleep(2)  # all of them wait by now
    outstanding = [int(line(process)) for process in children]
    assert sorted(number > 0 for number in outstanding) == [False, False, True]
    for process in children:
        process.communicate("\n")


def test_a_bad_record_makes_no_whole_table(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", VOCAB)
    flip_byte(table, 9)
    with pytest.raises(RecordError, match="token 9"):
        whole(table)


def test_many_processes_at_once_read_it_once(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 400, "page")
    children = [child(table) for _ in range(3)]
    outstanding = [int(line(process)) for process in children]
    assert sorted(number > 0 for number in outstanding) == [False, False, True]
    for process in children:
        process.communicate("\n")


def test_too_little_shared_memory_says_what_to_do(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 400, "page")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def limited() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # fallocate fails as on a full file system
        try:
            whole(table)
        except MemoryError as error:
            queue.put(str(error))

    process = context.Process(target=limited)
    process.start()
    process.join()
    assert "shm-size" in queue.get()


def test_misses_of_a_pager_come_from_it(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", VOCAB)
    with open_pager(table, 4, VOCAB) as (pager, metrics):
        for first in range(0, VOCAB - 4, 2):
            lease = pager.acquire(range(first, first + 4))
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
            pager.check()
        assert value(metrics, "tol_misses_total", "disk") == 0
        assert value(metrics, "tol_fills_total", "host", "demand") == value(metrics, "tol_misses_total", "host") > 0
        assert value(metrics, "tol_slots_used", "host") == VOCAB
