"""The table file: what is written is read, and what is damaged is refused or named."""

import json
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tol.tables import SHAPES, flip_byte, make_table, random_records, shard_file
from tolserve.tol.encoding import RowLayout
from tolserve.tol.manifest import header, record_stride
from tolserve.tol.table import RecordError, Table, TableError, describe, verify
from tolserve.tol.writer import TableWriter


@given(
    vocab_size=st.integers(1, 40),
    layers=st.integers(1, 9),
    hidden_size=st.integers(1, 64).map(lambda n: 16 * n),
    dropped=st.sets(st.integers(0, 3), max_size=3),
    shard_bytes=st.integers(1, 200_000),
    batches=st.lists(st.integers(1, 15), max_size=10),
)
@settings(max_examples=60)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    vocab_size: int,
    layers: int,
    hidden_size: int,
    dropped: set[int],
    shard_bytes: int,
    batches: list[int],
) -> None:
    dropped = {layer for layer in dropped if layer < layers - 1}
    record_bytes = (layers - len(dropped)) * hidden_size * 2
    records = random_records(vocab_size, record_bytes)
    path = tmp_path_factory.mktemp("round") / "t"
    writer = TableWriter(
        path,
        vocab_size=vocab_size,
        num_layers=layers,
        hidden_size=hidden_size,
        fingerprint="abc",
        dropped_layers=tuple(dropped),
        shard_bytes=shard_bytes,
    )
    start = 0
    for size in [*batches, vocab_size]:
        writer.write(records[start : start + size])
        start = min(vocab_size, start + size)
    assert not path.exists()
    manifest = writer.finish()

    table = Table.open(path)
    assert table.manifest == manifest
    assert manifest.layers == tuple(layer for layer in range(layers) if layer not in dropped)
    for token in range(vocab_size):
        assert np.array_equal(table.read_record(token), records[token])
    verify(table)
    # Other tools see ordinary safetensors files with the records in token order.
    shards = [load_file(path / shard.file)["records"] for shard in manifest.shards]
    assert {shard.shape[1] for shard in shards} == {manifest.record_stride}
    assert np.array_equal(np.concatenate(shards)[:, :record_bytes], records)
    assert all(shard.data_start % 4096 == 0 for shard in manifest.shards)
    checksums = load_file(path / "checksums.safetensors")["checksums"]
    groups = 1 if len(manifest.layers) < 4 else 2
    first = -(-len(manifest.layers) // 4) * hidden_size * 2 if groups == 2 else record_bytes
    parts = [[record[:first], record[first:]][:groups] for record in records]
    assert checksums.tolist() == [[zlib.crc32(part.tobytes(), t) for part in of] for t, of in enumerate(parts)]
    assert [file.name for file in path.parent.iterdir()] == ["t"]


@given(st.integers(1, 300_000))
@example(18_432)  # a tenth of 20,480 exactly
def test_stride_pads_to_pages_only_where_that_wastes_under_a_tenth(record_bytes: int) -> None:
    stride = record_stride(record_bytes)
    padded = next(size for size in range(record_bytes, record_bytes + 4096) if size % 4096 == 0)
    assert stride == (padded if Fraction(padded - record_bytes, padded) < Fraction(1, 10) else record_bytes)


def test_a_record_of_the_1b_shape_is_24_pages() -> None:
    assert record_stride(24 * 2048 * 2) == 98_304


@pytest.mark.parametrize("shape", SHAPES)
def test_describe_gives_sizes_with_and_without_padding(tmp_path: Path, shape: str) -> None:
    table, records = make_table(tmp_path / "t", 10, shape, shard_bytes=30_000)
    facts = describe(table)
    assert facts["payload_bytes"] == records.nbytes
    assert facts["stored_bytes"] == 10 * {"page": 4096, "padded": 8192, "packed": 1536}[shape]
    assert facts["file_bytes"] == sum(file.stat().st_size for file in table.path.iterdir())
    assert sum(shard["tokens"] for shard in facts["shards"]) == facts["vocab_size"] == 10
    assert facts["encoding"] == {"name": "bf16"}
    json.dumps(facts)


def test_a_table_without_its_manifest_is_none(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    (table.path / "manifest.json").unlink()
    with pytest.raises(TableError, match=r"no manifest\.json"):
        Table.open(table.path)
    with pytest.raises(TableError, match=r"no manifest\.json"):
        Table.open(tmp_path / "nowhere")


def test_a_valid_table_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    _, records = make_table(tmp_path / "t", 20)
    new = random_records(8, 1536, seed=1)

    def writer() -> TableWriter:
        return TableWriter(tmp_path / "t", vocab_size=8, num_layers=3, hidden_size=256, fingerprint="new")

    aborted = writer()
    aborted.write(new[:5])
    with pytest.raises(TableError, match="another build is writing"):
        writer()
    with pytest.raises(TableError, match="5 of 8"):
        aborted.finish()
    aborted.abort()
    assert np.array_equal(Table.open(tmp_path / "t").read_record(19), records[19])
    finished = writer()
    finished.write(new)
    assert Table.open(tmp_path / "t").manifest.vocab_size == 20
    finished.finish()
    finished.abort()  # too late to undo anything
    assert Table.open(tmp_path / "t").manifest.fingerprint == "new"
    assert np.array_equal(Table.open(tmp_path / "t").read_record(7), new[7])
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, message in (("home", r"thesis\.txt"), ("file", "is a file")):
        with pytest.raises(TableError, match=message):
            make_table(tmp_path / name)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "records",
    [
        np.zeros((2, 1535), np.uint8),
        np.zeros((2, 1536), np.int8),
        np.zeros(1536, np.uint8),
        np.zeros((9, 1536), np.uint8),
    ],
)
def test_the_writer_refuses_what_does_not_fit(tmp_path: Path, records: Any) -> None:
    writer = TableWriter(tmp_path / "t", vocab_size=8, num_layers=3, hidden_size=256, fingerprint="f")
    with pytest.raises(TableError, match="records"):
        writer.write(records)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "shape",
    [
        {"vocab_size": 0},
        {"num_layers": 0},
        {"dropped_layers": (3,)},
        {"dropped_layers": (0, 0)},
        {"dropped_layers": (0, 1, 2)},
        {"hidden_size": 0},
        {"fingerprint": ""},
    ],
)
def test_the_writer_refuses_impossible_shapes(tmp_path: Path, shape: dict[str, Any]) -> None:
    with pytest.raises(TableError, match="no table has"):
        TableWriter(
            tmp_path / "t", **{"vocab_size": 8, "num_layers": 3, "hidden_size": 256, "fingerprint": "f", **shape}
        )
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_one_group_is_read_as_before(tmp_path: Path) -> None:
    """As they were all written once: no table is built again because of its groups."""
    table, records = make_table(tmp_path / "t", 20, "grouped")
    assert [len(group.layers) for group in table.manifest.groups] == [3, 6]
    file, sums = table.path / "manifest.json", table.path / "checksums.safetensors"
    raw = json.loads(file.read_text())
    raw["groups"] = [{"layers": list(range(9)), "offset": 0, "bytes": 4032}]
    file.write_text(json.dumps(raw))
    metadata = {"fingerprint": "f" * 32, "first_token": "0"}
    checksums = np.array([zlib.crc32(record.tobytes(), token) for token, record in enumerate(records)], "<u4")
    sums.write_bytes(header("checksums", "U32", (20, 1), metadata) + checksums.tobytes())
    old = Table.open(table.path)
    verify(old)
    assert np.array_equal(old.read_record(7), records[7])
    assert old.manifest.row_layout(4) == (0, RowLayout(4 * 448, 224, "bf16", None))
    assert table.manifest.row_layout(4) == (1, RowLayout(448, 224, "bf16", None))
    with pytest.raises(KeyError):
        old.manifest.row_layout(9)


def test_what_a_read_moves_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40, "grouped", shard_bytes=15 * 4096)
    manifest = table.manifest
    for groups in (range(1), range(1, 2), range(2)):
        moved = []
        for token in range(40):
            start = table.locate(token)[1] + manifest.groups[groups.start].offset
            size = sum(manifest.groups[group].bytes for group in groups)
            moved.append(len({at // 4096 for at in range(start, start + size)}) * 4096)
        assert manifest.read_bytes(groups) == np.mean(moved)


# A manifest from a stranger.


def set_at(*keys: Any) -> Callable[[Any, Any], None]:
    def change(raw: Any, value: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        (set_at("format_version"), 2, "format_version is 2"),
        (set_at("format_version"), None, "format_version"),
        (set_at("encoding"), {"name": "int8"}, "encoding"),
        (set_at("encoding"), {"name": "int8", "group_size": 64}, "group"),
        (set_at("encoding"), {"name": "int8", "group_size": 96}, "no multiple of the group size 96"),
        (set_at("encoding"), {"name": "lowrank", "ranks": [256, 256, 256]}, "factors"),
        (set_at("factors"), {"file": "factors.safetensors", "crc32": 0}, "unknown 'factors'"),
        (set_at("layout"), "layer-major", "layout"),
        (set_at("frequencies"), [1], "frequencies"),
        (set_at("surprise"), 1, "unknown 'surprise'"),
        (set_at("fingerprint"), "", "fingerprint"),
        (set_at("fingerprint"), 7, "fingerprint"),
        (set_at("vocab_size"), 41, "vocab_size"),
        (set_at("vocab_size"), True, "vocab_size is True; it must"),
        (set_at("vocab_size"), 40.0, "vocab_size"),
        (set_at("vocab_size"), "40", "vocab_size"),
        (set_at("vocab_size"), 2**70, "vocab_size"),
        (set_at("num_layers"), 10**15, "layers"),
        (set_at("num_layers"), 4, "layers"),
        (set_at("layers"), [0, 0, 1], "layers"),
        (set_at("layers"), [2, 1, 0], "groups"),
        (set_at("dropped_layers"), [2], "layers"),
        (set_at("dropped_layers"), None, "dropped_layers"),
        (set_at("hidden_size"), 128, "group"),
        (set_at("hidden_size"), -256, "hidden_size"),
        (set_at("record_bytes"), 1535, "record_bytes"),
        (set_at("record_stride"), 1535, "record_stride"),
        (set_at("record_stride"), 1537, "asks for"),
        (set_at("groups"), [], "groups"),
        (set_at("groups"), 5, "groups"),
        (set_at("groups", 0, "offset"), -8, "offset"),
        (set_at("groups", 0, "bytes"), 1024, "group"),
        (set_at("groups", 0, "extra"), 1024, "extra"),
        (set_at("shards"), [], "shards"),
        (set_at("shards", 0, "file"), "../t/records-00001-of-00002.safetensors", "file name"),
        (set_at("shards", 0, "file"), "/etc/passwd", "file name"),
        (set_at("shards", 0, "file"), "..", "file name"),
        (set_at("shards", 0, "file"), "", "file name"),
        (set_at("shards", 0, "file"), "a\0b", "file name"),
        (set_at("shards", 0, "file"), "records-00002-of-00002.safetensors", "same file"),
        (set_at("shards", 0, "file"), "absent", "absent"),
        (set_at("shards", 0, "first_token"), -1, "first_token"),
        (set_at("shards", 1, "first_token"), 19, "a gap or an overlap"),
        (set_at("shards", 1, "first_token"), 21, "a gap or an overlap"),
        (set_at("shards", 0, "tokens"), 21, "a gap or an overlap"),
        (set_at("shards", 0, "tokens"), 0, "tokens"),
        (set_at("shards", 1, "tokens"), 2**62, "vocab_size"),
        (set_at("shards", 0, "data_start"), 8192, "another table"),
        (set_at("shards", 0, "data_start"), 100, "multiple of 4096"),
    ],
)
def test_a_false_manifest_is_refused(
    tmp_path: Path, change: Callable[[Any, Any], None], value: Any, message: str
) -> None:
    table, _ = make_table(tmp_path / "t", 40, shard_bytes=20 * 1536)
    file = table.path / "manifest.json"
    raw = json.loads(file.read_text())
    change(raw, value)
    file.write_text(json.dumps(raw))
    with pytest.raises(TableError, match=message):
        Table.open(table.path)


def test_every_key_of_the_manifest_is_needed(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    file = table.path / "manifest.json"
    whole = json.loads(file.read_text())
    for key in whole:
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(TableError, match=key):
            Table.open(table.path)
    for text in ("", "[]", "{", "null", "\xff", "[" * 100_000):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(TableError, match="manifest"):
            Table.open(table.path)


# Files that are not what the manifest says.


def test_lengths_and_headers_are_checked_at_open(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t")
    for name in ("records-00001-of-00001.safetensors", "checksums.safetensors"):
        file = table.path / name
        whole = file.read_bytes()
        header = json.loads(whole[8:4096])
        tensor = next(key for key in header if key != "__metadata__")
        wrong_offsets = json.dumps(header | {tensor: header[tensor] | {"data_offsets": [0, 4]}}).encode().ljust(4088)
        other_table = json.dumps(header | {"__metadata__": {"fingerprint": "x"}}).encode().ljust(4088)
        for damaged in (
            whole[:-1],
            whole + b"\0",
            whole[:4096],
            whole[:5],
            b"",
            struct.pack("<Q", 2**63) + whole[8:],
            struct.pack("<Q", len(whole)) + whole[8:],
            struct.pack("<Q", 10) + whole[8:],
            whole[:8] + b"[" * 4088 + whole[4096:],
            whole[:8] + b"{}".ljust(4088) + whole[4096:],
            whole[:8] + wrong_offsets + whole[4096:],
            whole[:8] + other_table + whole[4096:],
        ):
            file.write_bytes(damaged)
            with pytest.raises(TableError, match=name):
                Table.open(table.path)
        file.unlink()
        with pytest.raises(TableError, match=name):
            Table.open(table.path)
        file.write_bytes(whole)
    Table.open(table.path)


def test_a_shard_of_another_table_is_refused(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40, shard_bytes=20 * 1536)
    first, second = (table.path / shard.file for shard in table.manifest.shards)
    swapped = first.rename(tmp_path / "aside")
    second.rename(first)
    swapped.rename(second)
    with pytest.raises(TableError, match="another table"):
        Table.open(table.path)


@given(st.integers(0, 39), st.integers(0, 8063), st.integers(0, 39))
@settings(max_examples=30)
def test_verify_names_the_damaged_records(
    tmp_path_factory: pytest.TempPathFactory, damaged: int, at: int, moved: int
) -> None:
    table, records = make_table(tmp_path_factory.mktemp("bad") / "t", 40, "padded", shard_bytes=100_000)
    flip_byte(table, damaged, at)
    with pytest.raises(RecordError) as caught:
        table.read_record(damaged)
    assert (caught.value.token, caught.value.kind) == (damaged, "checksum")
    with pytest.raises(TableError, match=rf"1 of 40 records are bad: record of token {damaged}:"):
        verify(table)
    flip_byte(table, damaged, at)
    seen: list[tuple[int, int]] = []
    verify(table, lambda done, total: seen.append((done, total)))
    assert seen == [(done, 40) for done in range(1, 41)]
    # An intact record in another's place is caught as well.
    path, offset = shard_file(table, damaged)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(records[moved].tobytes())
    if moved != damaged:
        with pytest.raises(TableError, match=f"token {damaged}:"):
            verify(table)


def test_equal_records_have_unequal_checksums(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / "t", vocab_size=50, num_layers=1, hidden_size=64, fingerprint="f")
    writer.write(np.zeros((50, 128), np.uint8))
    writer.finish()
    assert len(np.unique(Table.open(tmp_path / "t").checksums)) == 50


def test_a_record_that_is_not_there_is_named(tmp_path: Path) -> None:
    table, _ = make_table(tmp_path / "t", 40)
    for token in (-1, 40):
        with pytest.raises(IndexError, match=str(token)):
            table.read_record(token)
    path, offset = shard_file(table, 30)
    with path.open("r+b") as file:
        file.truncate(offset + 10)
    with pytest.raises(TableError, match=r"10 of 40 records are bad: record of token 30: 10 of 1536 bytes"):
        verify(table)
    path.unlink()
    with pytest.raises(RecordError) as caught:
        table.read_record(3)
    assert caught.value.kind == "io"
