"""The pager against the table itself: whatever the interleaving, a leased slot holds its token's bytes."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tol.tables import HeldTable, Records, assert_bytes, bytes_in, flip_byte, make_table, open_pager, shard_file, value
from tolserve.metrics import Metrics
from tolserve.tol.pager import Lease, Pager, RecordsUnavailable
from tolserve.tol.policy import POLICIES
from tolserve.tol.table import Table
from tolserve.tol.view import EVICTIONS_KEPT

VOCAB = 24


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Table, Records]:
    return make_table(tmp_path_factory.mktemp("tables") / "t", VOCAB, shard_bytes=10 * 1536)


def assert_idle(pager: Pager, metrics: Metrics) -> None:
    pager.preload([])  # waits for what is on its way
    pager.check()
    assert value(metrics, "tol_slots_pinned") == 0
    assert value(metrics, "tol_lookups_total") == value(metrics, "tol_hits_total") + value(metrics, "tol_misses_total")


def wait_for_reads(pager: Pager) -> None:
    pager.preload([])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


Step = tuple[str, list[int]]
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=7)
steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["acquire", "acquire", "acquire", "go on", "prefetch", "prefetch", "wait", "release", "release", "poll"]
        ),
        tokens,
    ),
    min_size=5,
    max_size=40,
)


def taken_over(pager: Pager, past: Lease, others: list[Lease], asked: list[int]) -> tuple[Lease, int]:
    """A lease that goes on with the tokens of another, or all but one, and as many new ones as fit; how many of them
    count."""
    pinned = {token for lease in others for token in lease.tokens}
    kept = list(past.tokens)[sum(asked) % 2 :]
    new: list[int] = []
    for token in asked:
        if len(pinned | {*kept, *new, token}) <= pager.slots:
            new.append(token)
    if not kept:
        pager.release(past)
    lease = pager.acquire([*new, *kept], dict.fromkeys(kept, past))
    assert lease.hits & set(kept) == past.hits & set(kept), "what was found then counts"
    return lease, len(set(new) - set(kept))


@given(steps, st.integers(1, 9), st.integers(0, 12), st.integers(1, 4), st.sampled_from(POLICIES))
@settings(max_examples=100)
def test_any_interleaving_hands_out_the_tables_bytes(
    small: tuple[Table, Records], trace: list[Step], slots: int, host_slots: int, depth: int, policy: str
) -> None:
    table, records = small
    options = {"read_depth": depth, "policy": policy, "frequent": [3, 1, 7, 0, 12]}
    with open_pager(table, slots, host_slots, **options) as (pager, metrics):
        open_leases: list[Lease] = []
        waited_for: set[Lease] = set()
        lookups = 0
        for action, asked in trace:
            if action == "acquire":
                pinned = {token for lease in open_leases for token in lease.tokens}
                if len(pinned | set(asked)) > slots:
                    with pytest.raises(ValueError, match="split the step"):
                        pager.acquire(asked)
                    continue
                pager.advance(len(asked), asked)
                lease = pager.acquire(asked)
                lookups += len(set(asked))
                assert lease.tokens.keys() == set(asked)
                open_leases.append(lease)
            elif action == "go on" and open_leases:
                past = open_leases.pop(sum(asked) % len(open_leases))
                lease, fresh = taken_over(pager, past, open_leases, asked)
                lookups += fresh
                open_leases.append(lease)
            elif action == "prefetch":
                assert 0 <= pager.prefetch(asked) <= len(set(asked))
            elif action == "wait" and open_leases:
                lease = open_leases[sum(asked) % len(open_leases)]
                assert lease.wait() >= 0
                waited_for.add(lease)
            elif action == "release" and open_leases:
                lease = open_leases.pop(sum(asked) % len(open_leases))
                pager.release(lease)
                pager.release(lease)
            elif action == "poll":
                pager.poll()
                pager.end(len(asked))
            pager.check()
            # Several leases may be out; what was once there must stay, byte for byte, until its release.
            for lease in waited_for.intersection(open_leases):
                assert_bytes(pager, lease, records)
            pinned = {token for lease in open_leases for token in lease.tokens}
            for part in range(len(pager.parts)):
                claimed = {slot for lease in open_leases for slot in lease.slots[part].values()}
                assert len(claimed) == len(pinned)
            assert value(metrics, "tol_slots_used", "device") <= slots
            assert value(metrics, "tol_slots_used", "host") <= host_slots
        for lease in open_leases:
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
        assert value(metrics, "tol_lookups_total") == lookups
        assert value(metrics, "tol_slots", "device") == slots
        assert_idle(pager, metrics)


@dataclass
class Reference:
    """LRU with a list whose front is the oldest."""

    order: list[int] = field(default_factory=list)
    hits: list[set[int]] = field(default_factory=list)  # of each step
    evicted: list[int] = field(default_factory=list)  # the first one first
    uses: Counter[int] = field(default_factory=Counter)  # since each came in


def reference_lru(trace: list[list[int]], slots: int) -> Reference:
    run = Reference()
    for step in trace:
        distinct = list(dict.fromkeys(step))
        present = [token for token in distinct if token in run.order]
        run.hits.append(set(present))
        run.order = [token for token in run.order if token not in present] + present
        for token in distinct:
            if token not in present:
                if len(run.order) == slots:
                    victim = next(old for old in run.order if old not in distinct)
                    run.order.remove(victim)
                    run.evicted.append(victim)
                    del run.uses[victim]
                run.order.append(token)
            run.uses[token] += 1
    return run


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=6), max_size=30), st.integers(6, 12))
@settings(max_examples=40)
def test_one_step_after_another_is_plain_lru(small: tuple[Table, Records], trace: list[list[int]], slots: int) -> None:
    run = reference_lru(trace, slots)
    with open_pager(small[0], slots) as (pager, metrics):
        for step, expected in zip(trace, run.hits, strict=True):
            lease = pager.acquire(step)
            assert lease.hits == expected
            lease.wait()
            pager.release(lease)
        assert value(metrics, "tol_evictions_total", "device") == len(run.evicted)
        assert value(metrics, "tol_hits_total") == sum(map(len, run.hits))
        view = pager.view(limit=VOCAB)
        assert (view.slots, view.used) == (slots, len(run.order))
        assert [record.token for record in view.residents] == run.order[::-1]
        assert {record.token: record.uses for record in view.residents} == run.uses
        assert view.evicted == run.evicted[::-1][:EVICTIONS_KEPT]
        last = set(trace[-1]) if trace else set()
        assert {record.token for record in view.residents if record.state == "pinned"} == last
        assert pager.view(limit=2).residents == view.residents[:2]


def test_a_view_tells_pinned_and_arriving_records_from_the_others(small: tuple[Table, Records]) -> None:
    table = HeldTable(small[0])
    with open_pager(table, 6) as (pager, metrics):
        for step in ([1, 2], [3]):
            lease = pager.acquire(step)
            lease.wait()
            pager.release(lease)
        with table.held():
            pager.prefetch([4])
            using = pager.acquire([2])
            states = {record.token: record.state for record in pager.view(10).residents}
            assert states == {1: "resident", 2: "pinned", 3: "pinned", 4: "arriving"}
        pager.release(using)
        assert_idle(pager, metrics)


def test_all_series_show_before_anything_happens(small: tuple[Table, Records]) -> None:
    with open_pager(small[0], 4, 4) as (_, metrics):
        series = {(m.name.removeprefix("tolserve_"), s.labels): s.value for m in metrics.snapshot() for s in m.samples}
    zero = {
        ("tol_lookups_total", ()), ("tol_hits_total", ()), ("tol_stall_seconds_total", ()),
        ("tol_stalled_steps_total", ()),
        *(("tol_misses_total", (source,)) for source in ("host", "disk", "inflight")),
        *(("tol_fills_total", (s, c)) for s in ("host", "disk") for c in ("demand", "prefetch", "preload")),
        *(("tol_read_bytes_total", (source,)) for source in ("host", "disk")),
        *(("tol_fill_seconds", (source,)) for source in ("host", "disk")),
        *(
            (name, (tier,))
            for name in ("tol_evictions_total", "tol_slots_used", "tol_slots_pinned")
            for tier in ("device", "host")
        ),
        *(("tol_read_errors_total", (kind,)) for kind in ("io", "short", "checksum")),
    }  # fmt: skip
    sizes = {("tol_slots", ("device",)): 4, ("tol_slots", ("host",)): 4, ("tol_record_bytes", ()): 1536}
    assert series == dict.fromkeys(zero, 0) | sizes


def test_misses_say_where_the_record_was(small: tuple[Table, Records]) -> None:
    table, records = small
    with open_pager(table, 2, 8) as (pager, metrics):
        for step in ([0, 1], [2, 3], [0, 2], [2, 2, 0]):
            lease = pager.acquire(step)
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
        # 0, 1, 2, 3 from disk; then 0 from the host tier beside 2, a hit; then two hits.
        assert value(metrics, "tol_misses_total", "disk") == 4
        assert value(metrics, "tol_misses_total", "host") == 1
        assert value(metrics, "tol_hits_total") == 3
        assert value(metrics, "tol_fills_total", "disk", "demand") == 4
        assert value(metrics, "tol_fills_total", "host", "demand") == 1
        assert value(metrics, "tol_read_bytes_total", "host") == table.manifest.record_bytes
        # Records are packed: each read moves the one or two pages that cover 1,536 bytes.
        assert value(metrics, "tol_read_bytes_total", "disk") % 4096 in (0, 1536 * VOCAB % 4096)


def test_a_prefetched_record_is_a_fill_and_later_a_hit(small: tuple[Table, Records]) -> None:
    with open_pager(small[0], 8) as (pager, metrics):
        assert pager.prefetch([3, 4, 3]) == 2
        wait_for_reads(pager)
        assert pager.prefetch([3, 4]) == 0
        assert value(metrics, "tol_lookups_total") == 0
        lease = pager.acquire([3, 4])
        assert lease.hits == {3, 4}
        assert lease.wait() == 0.0
        pager.release(lease)
        assert value(metrics, "tol_fills_total", "disk", "prefetch") == 2
        assert value(metrics, "tol_fills_total", "disk", "demand") == 0
        assert_idle(pager, metrics)


def test_a_read_in_flight_is_joined_and_not_repeated(small: tuple[Table, Records]) -> None:
    table, records = HeldTable(small[0]), small[1]
    with open_pager(table, 8, read_depth=1) as (pager, metrics):
        with table.held():
            assert pager.prefetch([4]) == 1
            assert pager.prefetch([4]) == 0
            leases = [pager.acquire([5, 6]), pager.acquire([6, 5, 4])]
            assert [lease.hits for lease in leases] == [set(), set()]
        for lease in leases:
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
        assert value(metrics, "tol_misses_total", "disk") == 2
        assert value(metrics, "tol_misses_total", "inflight") == 3
        assert value(metrics, "tol_fills_total", "disk", "demand") == 2
        assert value(metrics, "tol_fills_total", "disk", "prefetch") == 1
        assert_idle(pager, metrics)


def test_prefetch_evicts_neither_pinned_nor_unused_records(small: tuple[Table, Records]) -> None:
    table, records = small
    with open_pager(table, 4) as (pager, _):
        lease = pager.acquire([0, 1])
        lease.wait()
        assert pager.prefetch([2, 3, 4]) == 2  # the free slots; 4 finds none
        wait_for_reads(pager)
        assert pager.prefetch([5]) == 0
        assert_bytes(pager, lease, records)
        pager.release(lease)
        assert pager.prefetch([0, 5, 6]) == 1  # 5 replaces 1; 0 is wanted itself
        wait_for_reads(pager)
        used = pager.acquire([2, 3, 0, 5])
        assert used.hits == {0, 2, 3, 5}
        pager.release(used)
        assert pager.prefetch([6, 7, 8, 9]) == 4  # all were used by now


def test_prefetched_records_that_are_not_needed_any_more_are_ordinary_ones(small: tuple[Table, Records]) -> None:
    table = HeldTable(small[0])
    with open_pager(table, 3) as (pager, metrics):
        with table.held():
            pager.prefetch([0, 1])
            assert (pager.prefetched, pager.ahead) == (2, 2)
            assert [pager.present(token) for token in range(3)] == [True, True, False]
            pager.unneeded([1, 5])
            assert (pager.prefetched, pager.ahead) == (1, 1)
        wait_for_reads(pager)
        assert (pager.prefetched, pager.ahead) == (1, 0)
        assert pager.prefetch([3, 4, 5]) == 2, "a free slot, and that of 1"
        wait_for_reads(pager)
        assert not pager.present(1)
        pager.release(pager.acquire([0, 3, 4]))
        assert_idle(pager, metrics)


def test_prefetch_keeps_what_is_there_and_wanted(small: tuple[Table, Records]) -> None:
    with open_pager(small[0], 3) as (pager, _):
        pager.release(pager.acquire([0, 1, 2]))
        wait_for_reads(pager)
        assert pager.prefetch([0]) == 0
        pager.release(pager.acquire([3]))  # evicts the oldest, which is 1 now
        wait_for_reads(pager)
        assert pager.acquire([0, 2, 3]).hits == {0, 2, 3}


def test_acquire_waits_for_slots_that_prefetches_fill(small: tuple[Table, Records]) -> None:
    table, records = HeldTable(small[0]), small[1]
    with open_pager(table, 3, read_depth=1) as (pager, metrics):
        with table.held() as go:
            assert pager.prefetch([0, 1, 2]) == 3
            threading.Timer(0.3, go.set).start()
            lease = pager.acquire([10, 11, 12])
        waited = lease.wait()
        assert 0.05 < waited < 30  # what acquire was blocked is part of the step's stall
        assert lease.wait() == 0.0
        assert_bytes(pager, lease, records)
        assert value(metrics, "tol_stalled_steps_total") == 1
        assert value(metrics, "tol_stall_seconds_total") == waited
        pager.release(lease)
        assert_idle(pager, metrics)


def test_a_step_waits_for_its_own_reads_once(small: tuple[Table, Records]) -> None:
    table, records = HeldTable(small[0]), small[1]
    with open_pager(table, 4, read_depth=1) as (pager, metrics):
        with table.held() as go:
            lease = pager.acquire([0, 1])
            threading.Timer(0.3, go.set).start()
            waited = lease.wait()
        assert 0.05 < waited < 30
        assert lease.wait() == 0.0
        assert_bytes(pager, lease, records)
        pager.release(lease)
        lease = pager.acquire([0, 1])
        assert lease.wait() == 0.0
        assert value(metrics, "tol_stalled_steps_total") == 1
        assert value(metrics, "tol_stall_seconds_total") == waited


def test_a_lease_released_early_leaves_its_reads_to_land(small: tuple[Table, Records]) -> None:
    table, records = HeldTable(small[0]), small[1]
    with open_pager(table, 4, read_depth=1) as (pager, metrics):
        with table.held():
            pager.release(pager.acquire([0, 1, 2, 3]))
            assert value(metrics, "tol_slots_pinned", "device") == 0
            assert pager.prefetch([4]) == 0  # every slot has its read to come
            pager.check()
        wait_for_reads(pager)
        lease = pager.acquire([0, 1, 2, 3])
        assert lease.hits == {0, 1, 2, 3}
        assert_bytes(pager, lease, records)
        pager.release(lease)
        assert_idle(pager, metrics)


def test_a_step_that_does_not_fit_changes_nothing(small: tuple[Table, Records]) -> None:
    with open_pager(small[0], 3) as (pager, metrics):
        lease = pager.acquire([0, 1])
        for asked in ([2, 3], [1, 2, 3, 4], range(24)):
            with pytest.raises(ValueError, match="split the step"):
                pager.acquire(list(asked))
        for asked in ([VOCAB], [-1], [0, 2**63]):
            with pytest.raises(ValueError, match="table's 24"):
                pager.acquire(asked)
            with pytest.raises(ValueError, match="table's 24"):
                pager.prefetch(asked)
        assert value(metrics, "tol_lookups_total") == 2
        pager.release(lease)
        with pytest.raises(RuntimeError, match="released"):
            lease.wait()
        assert pager.acquire([]).wait() == 0.0
        assert_idle(pager, metrics)


@pytest.mark.parametrize(("device_slots", "host_slots"), [(0, 0), (-1, 0), (1, -1)])
def test_impossible_sizes_are_refused(small: tuple[Table, Records], device_slots: int, host_slots: int) -> None:
    with pytest.raises(ValueError, match="at least"), open_pager(small[0], device_slots, host_slots):
        pass


def test_preload_of_everything_makes_every_lookup_a_hit(small: tuple[Table, Records]) -> None:
    table, records = small
    with open_pager(table, 1000) as (pager, metrics):
        assert pager.slots == VOCAB
        pager.preload()
        lease = pager.acquire(range(VOCAB))
        assert lease.hits == set(range(VOCAB))
        assert_bytes(pager, lease, records)
        assert value(metrics, "tol_fills_total", "disk", "preload") == VOCAB
        pager.release(lease)
        assert_idle(pager, metrics)


def test_preload_fills_free_slots_and_evicts_nothing(small: tuple[Table, Records]) -> None:
    with open_pager(small[0], 4) as (pager, metrics):
        pager.preload([0, 8, 7])
        pager.preload()
        assert pager.acquire([0, 8, 7, 1]).hits == {0, 8, 7, 1}
        assert value(metrics, "tol_evictions_total") == 0


def test_reads_of_a_step_run_at_the_same_time(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", 64, "padded")
    table = HeldTable(table)
    with open_pager(table, 64, read_depth=8) as (pager, metrics):
        with table.held():
            lease = pager.acquire(range(64))
            wait_until(lambda: pager.disk.peak_outstanding == 8)
        stall = lease.wait()
        assert_bytes(pager, lease, records)
        assert pager.disk.peak_outstanding == 8
        assert value(metrics, "tol_stall_seconds_total") == stall < value(metrics, "tol_fill_seconds")
        pager.release(lease)


# Faults: real files, really damaged.


def test_a_corrupt_record_fails_alone_and_recovers(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t")
    with open_pager(table, 8, 8) as (pager, metrics):
        flip_byte(table, 7)
        lease = pager.acquire([6, 7, 8])
        with pytest.raises(RecordsUnavailable, match="token 7") as caught:
            lease.wait()
        assert {token: error.kind for token, error in caught.value.errors.items()} == {7: "checksum"}
        with pytest.raises(RecordsUnavailable):
            lease.wait()
        assert value(metrics, "tol_read_errors_total", "checksum") == 2  # read twice
        pager.check()
        pager.release(lease)

        others = pager.acquire([6, 8])
        assert others.hits == {6, 8}
        assert_bytes(pager, others, records)
        pager.release(others)

        flip_byte(table, 7)
        again = pager.acquire([7])
        again.wait()
        assert again.hits == set()
        assert_bytes(pager, again, records)
        pager.release(again)
        assert_idle(pager, metrics)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_truncated_shard_fails_what_is_gone(tmp_path: Path, io: str) -> None:
    table, records = make_table(tmp_path / "t", 40, "page")
    path, offset = shard_file(table, 20)
    whole = path.read_bytes()
    with open_pager(table, 40, io=io) as (pager, metrics):
        with path.open("r+b") as file:
            file.truncate(offset + 100)
        lease = pager.acquire([3, 20, 30])
        with pytest.raises(RecordsUnavailable) as caught:
            lease.wait()
        assert {token: error.kind for token, error in caught.value.errors.items()} == {20: "short", 30: "short"}
        assert value(metrics, "tol_read_errors_total", "short") == 4
        pager.release(lease)
        with path.open("r+b") as file:  # the same file gets its bytes back
            file.write(whole)
        lease = pager.acquire([3, 20, 30])
        assert lease.wait() >= 0
        assert lease.hits == {3}
        assert_bytes(pager, lease, records)
        pager.release(lease)
        assert_idle(pager, metrics)


def test_a_failed_prefetch_is_told_to_nobody_until_it_is_needed(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    with open_pager(table, 4) as (pager, metrics):
        flip_byte(table, 2)
        assert pager.prefetch([1, 2]) == 2
        wait_for_reads(pager)
        assert value(metrics, "tol_read_errors_total", "checksum") == 2
        assert value(metrics, "tol_slots_used", "device") == 1
        lease = pager.acquire([1, 2])
        assert lease.hits == {1}
        with pytest.raises(RecordsUnavailable, match="token 2"):
            lease.wait()
        pager.release(lease)
        assert_idle(pager, metrics)


def test_several_leases_on_one_failing_read(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t")
    table = HeldTable(table)
    with open_pager(table, 8, read_depth=1) as (pager, metrics):
        flip_byte(table, 5)
        with table.held():
            early, first, second = pager.acquire([5, 1]), pager.acquire([5, 2]), pager.acquire([3, 5])
            pager.release(early)
        for lease in (first, second):
            with pytest.raises(RecordsUnavailable, match="token 5"):
                lease.wait()
        flip_byte(table, 5)
        third = pager.acquire([5])
        pager.release(first)  # must not take away the third's pin on the new read
        pager.release(second)
        pager.check()
        third.wait()
        assert_bytes(pager, third, records)
        assert value(metrics, "tol_slots_pinned", "device") == 1
        pager.release(third)
        assert_idle(pager, metrics)


def test_a_table_deleted_or_replaced_under_an_open_pager_goes_on(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t")
    with open_pager(table, 4) as (pager, metrics):
        make_table(tmp_path / "t", 50)  # another table in the same place, by rename
        for token in range(40):
            lease = pager.acquire([token])
            lease.wait()
            assert_bytes(pager, lease, records)
            pager.release(lease)
        assert value(metrics, "tol_read_errors_total") == 0


def test_preload_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t", 10)
    with open_pager(table, 10) as (pager, metrics):
        flip_byte(table, 4)
        pager.preload()
        assert value(metrics, "tol_fills_total", "disk", "preload") == 9
        good = pager.acquire([token for token in range(10) if token != 4])
        assert len(good.hits) == 9
        assert_bytes(pager, good, records)
        pager.release(good)
        assert_idle(pager, metrics)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 11), min_size=1, max_size=5), st.sets(st.integers(0, 11), max_size=3)),
        max_size=12,
    )
)
@settings(max_examples=25)
def test_faults_that_come_and_go_never_show_as_wrong_bytes(
    tmp_path_factory: pytest.TempPathFactory, trace: list[tuple[list[int], set[int]]]
) -> None:
    table, records = make_table(tmp_path_factory.mktemp("faulty") / "t", 12)
    with open_pager(table, 5, 3) as (pager, metrics):
        failed: Counter[int] = Counter()
        for asked, broken in trace:
            for token in broken:
                flip_byte(table, token)
            pager.prefetch(sorted(broken))
            lease = pager.acquire(asked)
            bad: set[int] = set()
            try:
                lease.wait()
            except RecordsUnavailable as error:
                bad = set(error.errors)
            assert bad <= broken
            failed.update(bad)
            for token in set(asked) - bad:
                assert np.array_equal(bytes_in(pager, lease, token), records[token])
            pager.check()
            pager.release(lease)
            wait_for_reads(pager)
            for token in broken:
                flip_byte(table, token)
        assert value(metrics, "tol_read_errors_total", "checksum") >= failed.total()
        assert_idle(pager, metrics)


def test_a_closed_pager_fails_what_was_still_queued(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    table = HeldTable(table)
    with open_pager(table, 8, read_depth=1) as (pager, metrics):
        with table.held() as go:
            lease = pager.acquire([1, 2, 3])
            closing = threading.Thread(target=pager.close)
            closing.start()
            wait_until(lambda: pager.disk._closed)
            go.set()
            closing.join()
        with pytest.raises(RecordsUnavailable, match="closed") as caught:
            lease.wait()
        assert {2, 3} <= caught.value.errors.keys() <= {1, 2, 3}  # 1 may have been read already
        pager.release(lease)
        pager.check()
        assert value(metrics, "tol_read_errors_total") == 0


def test_a_failing_delivery_is_raised_and_leaves_nothing_behind(tmp_path: Path) -> None:
    table, records = make_table(tmp_path / "t")
    table = HeldTable(table)
    with open_pager(table, 4, 4, read_depth=1) as (pager, metrics):
        with table.held():
            lease = pager.acquire([1, 2])
            arena = pager.parts[0].arena
            slots, arena._bytes = arena._bytes, arena._bytes[:0]  # a write fails with IndexError
        with pytest.raises(IndexError):
            lease.wait()
        with pytest.raises((IndexError, RecordsUnavailable)):  # raised once more if the two came one after the other
            lease.wait()
        with pytest.raises(RecordsUnavailable):
            lease.wait()
        arena._bytes = slots
        pager.release(lease)
        assert_idle(pager, metrics)
        lease = pager.acquire([1, 2])
        assert lease.hits == set()
        lease.wait()
        assert_bytes(pager, lease, records)


def test_an_acquire_that_raises_pins_nothing(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    table = HeldTable(table)
    with open_pager(table, 2, read_depth=1) as (pager, metrics):
        pager.preload([1])
        with table.held() as go:
            pager.prefetch([0])
            arena = pager.parts[0].arena
            slots, arena._bytes = arena._bytes, arena._bytes[:0]
            threading.Timer(0.3, go.set).start()
            with pytest.raises(IndexError):
                pager.acquire([1, 5])  # has pinned 1 when it waits for the slot of 0
        arena._bytes = slots
        assert_idle(pager, metrics)
