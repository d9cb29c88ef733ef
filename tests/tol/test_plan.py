"""The plan's own arithmetic, and what it says of a table against the table itself."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tol.tables import SHAPES, flip_byte, make_table, open_pager
from tolserve.tol.disk import DiskSource, ReadRequest
from tolserve.tol.encoding import EncodingError
from tolserve.tol.estimate import Demand, FromCounts
from tolserve.tol.plan import (
    DiskSpeed,
    Memory,
    Plan,
    PlanError,
    TableShape,
    add_tiers,
    amount,
    cache_sizes,
    default_step_ms,
    measure_disk,
    render,
)
from tolserve.tol.table import RecordError

MEMORY = Memory("float32", "float32", layers=1000, embedding=200, kv=30, kv_tokens=16, factors=0, host_cache=4)
DISK = DiskSpeed("direct", "bypassed", reads=1, p50_ms=0.5, p99_ms=2.0, bytes_per_second=8_192_000, outstanding=8)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tables_sizes_are_those_on_disk_and_in_the_arena(tmp_path: Path, shape: str) -> None:
    table, _ = make_table(tmp_path / "table", vocab_size=37, shape=shape)
    layers, hidden_size = SHAPES[shape]
    said = TableShape.of(table)
    built = TableShape.to_be_built("bf16", vocab_size=37, num_hidden_layers=layers, hidden_size=hidden_size)
    assert replace(said, path=None) == built
    assert (said.record_bytes, said.record_stride) == (table.manifest.record_bytes, table.manifest.record_stride)
    source = DiskSource(table)
    try:
        groups = range(len(table.manifest.groups))
        source.submit([ReadRequest(token, groups, lambda payload: None) for token in range(37)])
        moved = []
        while len(moved) < 37:
            moved += [read.bytes for read in source.finished(block=True)]
    finally:
        source.close()
    # The file's last page may be cut off: that read moves less than a page less.
    assert 0 <= said.read_bytes - np.mean(moved) < 4096 / 37
    with open_pager(table, device_slots=5) as (pager, _):
        assert sum(part.arena.data.nbytes for part in pager.parts) == 5 * said.slot_bytes


def test_a_table_that_is_still_to_be_built() -> None:
    shape = {"vocab_size": 128_256, "num_hidden_layers": 24, "hidden_size": 2048}
    bf16, int8 = TableShape.to_be_built("bf16", **shape), TableShape.to_be_built("int8", **shape)
    assert (bf16.record_bytes, bf16.read_bytes) == (98_304, 98_304)
    assert 24 * 2048 < int8.record_bytes < 1.05 * 24 * 2048
    for name in ("int3", "lowrank"):
        with pytest.raises(EncodingError, match=name):
            TableShape.to_be_built(name, **shape)


def test_the_disk_is_measured_in_about_a_second(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "table", vocab_size=37, shape="page")
    started = time.perf_counter()
    speed = measure_disk(table)
    assert 0.9 < time.perf_counter() - started < 10
    assert speed.reads > 20
    assert 0 < speed.p50_ms <= speed.p99_ms
    assert speed.bytes_per_second > 4096 * 20
    assert speed.page_cache == {"direct": "bypassed"}.get(speed.io, speed.page_cache)
    for token in range(37):
        flip_byte(table, token)
    with pytest.raises(RecordError, match="checksum"):
        measure_disk(table)


def test_a_steps_reads_take_the_latency_and_the_bytes() -> None:
    assert DISK.seconds(0, 4096) == 0
    assert DISK.seconds(1, 4096) == pytest.approx(0.0005)
    assert DISK.seconds(3, 4096) == pytest.approx(0.0005 + 2 * 4096 / 8_192_000)


class _Fixed:
    """Half of the steps read nothing, 0.495 one record, 0.005 three; unknown below 10 slots."""

    note = "fixed"

    def __call__(self, slots: int, sequences: int) -> Demand | None:
        reads = np.array([0.5, 0.495, 0, 0.005])
        return Demand(4.0, 0.25, 0.51, reads) if slots >= 10 else None


def test_a_rows_figures() -> None:
    table = TableShape(None, "bf16", 100, 4096, 4096, 4096.0, 4096)
    plan = Plan({"num_hidden_layers": 10}, MEMORY, table)
    seen: list[tuple[int, int]] = []
    planned = add_tiers(plan, [5, 10], [1, 32], None, DISK, _Fixed(), lambda *done: seen.append(done))
    small, _, one, many = planned.rows
    assert (small.slots, small.device_bytes, small.total_bytes) == (5, 5 * 4096, 5 * 4096 + 1234)
    assert (small.hit_rate, small.stall_ms, small.read_bytes) == (None, None, None)
    assert (one.sequences, one.step_ms, many.sequences, many.step_ms) == (1, 1.0, 32, 2.0)
    assert one.hit_rate == pytest.approx(1 - 0.76 / 4)
    assert (one.host_fills, one.disk_fills, one.read_bytes) == (0.25, 0.51, pytest.approx(0.51 * 4096))
    # 0.5 and 1.5 ms of reading, less a layer's share of the step: 0.1 ms of 1 and 0.2 ms of 2
    assert one.stall_ms == pytest.approx(0.495 * 0.4 + 0.005 * 1.4)
    assert many.stall_ms == pytest.approx(0.495 * 0.3 + 0.005 * 1.3)
    assert many.stall_share == pytest.approx(many.stall_ms / 2)
    assert one.stall_p99_ms == pytest.approx(0.4)
    assert one.steps_with_reads == pytest.approx(0.5)
    assert seen[-1] == (4, 4)
    (slow, _) = add_tiers(plan, [10], [1, 32], 50.0, DISK, _Fixed(), lambda *_: None).rows
    assert (slow.step_ms, slow.stall_ms) == (50.0, 0.0), "reads that are in before the first layer needs them"
    unmeasured = add_tiers(plan, [10], [1], None, None, _Fixed(), lambda *_: None)
    assert (unmeasured.rows[0].disk_fills, unmeasured.rows[0].stall_ms) == (0.51, None)
    assert "not measured" in " ".join(unmeasured.notes)


def test_which_sizes_are_planned() -> None:
    shape = TableShape.to_be_built("bf16", vocab_size=128_256, num_hidden_layers=24, hidden_size=2048)
    ffn_bytes = 3 * 2 * 24 * 2048 * 5464
    assert cache_sizes(shape, ffn_bytes, []) == [1282, 4098, 6412, 12_825, 25_651]
    assert cache_sizes(shape, ffn_bytes, ["100%", "1GiB", "7", "10%"])[-1] == 128_256
    assert {7, 2**30 // 98_304} < set(cache_sizes(shape, ffn_bytes, ["1GiB", "7"]))
    tiny = replace(shape, vocab_size=40)
    assert cache_sizes(tiny, ffn_bytes, []) == [2, 4, 8, 40]
    for size, words in (("1%", "holds no record"), ("0", "at least one"), ("2 cups", "not understood")):
        with pytest.raises(PlanError, match=words):
            cache_sizes(tiny, ffn_bytes, [size])


def test_a_step_of_a_gpu() -> None:
    assert (default_step_ms(1), default_step_ms(32)) == (1.0, 2.0)


def test_columns_are_aligned_for_people() -> None:
    table = TableShape("/some/table", "bf16", 128_256, 98_304, 98_304, 98_304.0, 98_304)
    model = {"path": "m", "ffn_variant": "memory", "num_hidden_layers": 24, "hidden_size": 2048, "vocab_size": 128_256}
    sizes = [20, 1282, 128_256]
    planned = add_tiers(
        Plan(model, MEMORY, table), sizes, [1, 32], None, DISK, FromCounts(None, 128_256, "lru", 0), lambda *_: None
    )
    lines = render(planned).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("device cache"))
    shown = lines[start : start + 8]
    assert len({len(line) for line in shown}) == 1
    assert shown[3].count(" - ") >= 4, "a cache of 20 records holds no step of 32"
    assert "12.61 GB" in shown[-1]
    assert lines[-3].startswith("- Stall")


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (98_304, "98.3 kB"), (403e6, "403 MB"), (12.61e9, "12.61 GB")]
)
def test_amounts(size: float, words: str) -> None:
    assert amount(size) == words
