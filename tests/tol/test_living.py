"""A pager that lives: layer groups with slots of their own, sizes that change, tables that are replaced, faults."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tol.tables import Records, assert_bytes, bytes_in, flip_byte, make_table, open_pager, value
from tolserve.metrics import Metrics
from tolserve.tol.pager import Lease, Pager, RecordsUnavailable
from tolserve.tol.part import part_slots
from tolserve.tol.policy import POLICIES
from tolserve.tol.table import Table, TableError

VOCAB = 24
FREQUENT = [3, 1, 7, 0, 12]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Records]:
    return make_table(tmp_path_factory.mktemp("tables") / "t", VOCAB, "grouped")


@given(st.integers(1, VOCAB), st.none() | st.floats(1, 8))
def test_parts_take_the_bytes_they_were_given_and_no_more(
    grouped: tuple[Table, Records], records: int, head_factor: float | None
) -> None:
    manifest = grouped[0].manifest
    parts = part_slots(manifest, records, head_factor)
    assert [group for groups, _ in parts for group in groups] == list(range(len(manifest.groups)))
    assert all(1 <= slots <= VOCAB for _, slots in parts)
    size = sum(slots * manifest.groups[group].bytes for groups, slots in parts for group in groups)
    assert size <= records * manifest.record_bytes
    if len(parts) == 2:
        (_, head), (_, tail) = parts
        assert head >= tail
        rounding = manifest.record_bytes + manifest.groups[0].bytes * (head_factor or 1)
        assert size > records * manifest.record_bytes - rounding or head == VOCAB


def test_the_first_layers_rows_stay_longer(grouped: tuple[Table, Records]) -> None:
    table, records = grouped
    with open_pager(table, 8, head_factor=3.0) as (pager, metrics):
        head, tail = (part.slots for part in pager.parts)
        assert head > 8 > tail
        for token in range(head):
            lease = pager.acquire([token])
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
        moved = value(metrics, "tol_read_bytes_total", "disk")
        lease = pager.acquire([0])  # its head is there, its tail was evicted
        assert lease.hits == set()
        lease.wait()
        assert_bytes(pager, lease, records)
        pager.release(lease)
        assert value(metrics, "tol_evictions_total", "device") == head - tail + 1
        assert value(metrics, "tol_misses_total", "disk") == head + 1
        pages = table.manifest.groups[1].bytes + 2 * 4096
        assert value(metrics, "tol_read_bytes_total", "disk") - moved <= pages
        pager.check()


def test_waiting_for_the_first_part_does_not_wait_for_the_second(grouped: tuple[Table, Records]) -> None:
    """The first part is there; the second is copied from the host tier by whoever waits for it."""
    table, records = grouped
    with open_pager(table, 8, VOCAB - 1, head_factor=3.0) as (pager, metrics):
        head, _ = (part.slots for part in pager.parts)
        for token in range(head):
            pager.release(pager.acquire([token]))
        pager.preload([])  # waits for the reads
        lease = pager.acquire([0])
        copied = value(metrics, "tol_fills_total", "host", "demand")
        assert lease.wait(0) == 0.0
        assert value(metrics, "tol_fills_total", "host", "demand") == copied
        assert lease.wait(1) > 0.0
        assert value(metrics, "tol_fills_total", "host", "demand") == copied + 1
        assert_bytes(pager, lease, records)
        assert value(metrics, "tol_stalled_steps_total") == 1
        pager.release(lease)
        pager.check()


def test_a_part_keeps_room_for_the_next_steps_misses(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", 1100, "packed")
    with open_pager(table, 1024) as (pager, metrics):
        for first in range(0, 1100 - 10, 10):
            lease = pager.acquire(range(first, first + 10))
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
        assert len(pager.parts[0].free) == 1024 // 256
        evicted = value(metrics, "tol_evictions_total", "device")
        lease = pager.acquire(range(4))
        assert value(metrics, "tol_evictions_total", "device") == evicted  # nobody was asked who must go
        lease.wait()
        assert_bytes(pager, lease, records)
        pager.release(lease)
        pager.check()


@pytest.mark.parametrize("head_factor", [None, 3.0])
def test_a_resize_keeps_what_would_be_evicted_last(grouped: tuple[Table, Records], head_factor: float | None) -> None:
    table, records = grouped
    with open_pager(table, 12, 6, head_factor=head_factor) as (pager, metrics):
        for token in range(12):
            pager.release(pager.acquire([token]))
        pager.resize(device_slots=4, host_slots=2)
        assert value(metrics, "tol_slots", "device") == pager.slots <= 4
        assert value(metrics, "tol_slots", "host") == 2
        pager.check()
        kept = list(range(12 - pager.slots, 12))
        lease = pager.acquire(kept)
        assert lease.hits == set(kept)
        assert_bytes(pager, lease, records)
        pager.release(lease)
        pager.resize(device_slots=10, host_slots=0)
        lease = pager.acquire(kept)
        assert lease.hits == set(kept)
        assert_bytes(pager, lease, records)
        with pytest.raises(RuntimeError, match="between two steps"):
            pager.resize(device_slots=4, host_slots=2)
        pager.release(lease)
        pager.check()


def test_sizes_that_cannot_be_change_nothing(grouped: tuple[Table, Records]) -> None:
    table, records = grouped
    with open_pager(table, 6, 4) as (pager, _):
        for device_slots, host_slots in ((0, 1), (1, -1)):
            with pytest.raises(ValueError, match="at least"):
                pager.resize(device_slots=device_slots, host_slots=host_slots)
        with pytest.raises(ValueError, match="whole table"):
            pager.resize(device_slots=3, host_slots=VOCAB)
        assert (pager.slots, pager.host.slots) == (6, 4)
        lease = pager.acquire(range(6))
        lease.wait()
        assert_bytes(pager, lease, records)


def test_a_reopened_table_serves_the_new_bytes_and_stays_warm(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", VOCAB, "grouped")
    with open_pager(table, 10, 4, head_factor=3.0) as (pager, _):
        used = [1, 2, 5]
        pager.release(pager.acquire(used))
        other, _ = make_table(tmp_path / "other", VOCAB + 1)
        with pytest.raises(TableError, match="other weights|tokens"):
            pager.reopen(other)
        assert pager.table is table
        fresh, records = make_table(tmp_path / "new", VOCAB, "grouped", seed=5)
        pager.reopen(fresh)
        lease = pager.acquire(used)
        assert lease.hits == set(used)
        assert_bytes(pager, lease, records)
        pager.release(lease)
        lease = pager.acquire([9, 10])
        lease.wait()
        assert_bytes(pager, lease, records)
        pager.release(lease)
        pager.check()
        with pytest.raises(TableError, match="No such file"):
            pager.reopen(Table(tmp_path / "gone", fresh.manifest, fresh.checksums))
        assert pager.table is fresh


Action = tuple[str, list[int]]
names = st.sampled_from(
    ["acquire"] * 5 + ["prefetch"] * 3 + ["wait", "release"] * 3 + ["resize", "damage", "mend", "reopen", "end"]
)
actions = st.lists(st.tuples(names, st.lists(st.integers(0, VOCAB - 1), max_size=7)), min_size=5, max_size=50)


class World:
    """A pager, what it should hold, and what is broken now."""

    def __init__(self, pager: Pager, metrics: Metrics, versions: list[tuple[Table, Records]]) -> None:
        self.pager, self.metrics, self.versions = pager, metrics, versions
        self.version = 0
        self.leases: list[tuple[Lease, bool]] = []  # and whether it was waited for
        self.broken: set[tuple[int, int]] = set()  # version, token
        self.ever_broken: set[tuple[int, int]] = set()
        self.failed = 0

    @property
    def records(self) -> Records:
        return self.versions[self.version][1]

    def act(self, action: str, asked: list[int]) -> None:
        getattr(self, action)(asked)
        self.pager.check()
        for lease, waited in self.leases:
            if waited:
                self.compare(lease)

    def compare(self, lease: Lease) -> None:
        for token in lease.tokens:
            if token not in lease.lost:
                assert np.array_equal(bytes_in(self.pager, lease, token), self.records[token])

    def acquire(self, asked: list[int]) -> None:
        pinned = {token for lease, _ in self.leases for token in lease.tokens if lease.holds(token)}
        if len(pinned | set(asked)) > self.pager.slots:
            with pytest.raises(ValueError, match="split the step"):
                self.pager.acquire(asked)
            return
        self.leases.append((self.pager.acquire(asked), False))
        self.pager.advance(len(asked), asked)

    def prefetch(self, asked: list[int]) -> None:
        self.pager.prefetch(asked)

    def wait(self, asked: list[int]) -> None:
        if self.leases:
            index = sum(asked) % len(self.leases)
            lease, _ = self.leases[index]
            try:
                lease.wait(sum(asked) % len(self.pager.parts))
                lease.wait()
            except RecordsUnavailable as error:
                assert {(self.version, token) for token in error.errors} <= self.ever_broken
                assert error.errors.keys() == lease.lost
                self.failed += 1
            self.leases[index] = lease, True

    def release(self, asked: list[int]) -> None:
        if self.leases:
            lease, _ = self.leases.pop(sum(asked) % len(self.leases))
            self.pager.release(lease)
            self.pager.release(lease)

    def end(self, asked: list[int]) -> None:
        self.pager.end(len(asked))

    def resize(self, asked: list[int]) -> None:
        sizes = {"device_slots": 1 + sum(asked) % VOCAB, "host_slots": len(asked)}
        if self.leases:
            with pytest.raises(RuntimeError, match="between two steps"):
                self.pager.resize(**sizes)
        else:
            self.pager.resize(**sizes)
            room = sizes["device_slots"] * self.pager.table.manifest.record_bytes
            assert self.pager.device_bytes <= room
            assert self.pager.host.slots == len(asked)

    def reopen(self, asked: list[int]) -> None:
        if not self.leases:
            self.version = 1 - self.version
            self.pager.reopen(self.versions[self.version][0])

    def flip(self, marks: set[tuple[int, int]]) -> None:
        for version, token in marks:
            flip_byte(self.versions[version][0], token)

    def damage(self, asked: list[int]) -> None:
        marks = {(self.version, token) for token in asked} - self.broken
        self.flip(marks)
        self.broken |= marks
        self.ever_broken |= marks

    def mend(self, asked: list[int]) -> None:
        """Only once nothing is being read: what a read sees must be what `broken` says."""
        self.pager.preload([])
        self.flip(self.broken)
        self.broken.clear()


@given(
    trace=actions,
    slots=st.integers(2, 14),
    host_slots=st.integers(0, 12),
    policy=st.sampled_from(POLICIES),
    head_factor=st.sampled_from([None, 1.0, 2.5, 6.0]),
    io=st.sampled_from(["direct", "buffered"]),
)
@settings(max_examples=120, deadline=None)
def test_whatever_happens_every_record_handed_out_is_the_tables(
    tmp_path_factory: pytest.TempPathFactory,
    trace: list[Action],
    slots: int,
    host_slots: int,
    policy: str,
    head_factor: float | None,
    io: str,
) -> None:
    folder = tmp_path_factory.mktemp("versions")
    versions = [make_table(folder / str(seed), VOCAB, "grouped", seed=seed) for seed in range(2)]
    options = {"policy": policy, "frequent": FREQUENT, "head_factor": head_factor, "io": io, "read_depth": 3}
    with open_pager(versions[0][0], slots, host_slots, **options) as (pager, metrics):
        world = World(pager, metrics, versions)
        for action, asked in trace:
            world.act(action, asked)
        world.mend([])
        for lease, _ in world.leases:
            pager.release(lease)
        world.leases.clear()
        for first in range(0, VOCAB, pager.slots):
            lease = pager.acquire(range(first, min(first + pager.slots, VOCAB)))
            lease.wait()
            assert not lease.lost
            assert_bytes(pager, lease, world.records)
            pager.release(lease)
        pager.preload([])
        pager.check()
        assert value(metrics, "tol_slots_pinned") == 0
        if world.failed:
            assert value(metrics, "tol_read_errors_total", "checksum") >= 2
