"""The store of packs: what is loaded, within which bounds, and what no file may do."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from packs import Changes, random_changes, save_pack, target_of
from tol.tables import value
from tolserve.engine.messages import Packs, decode_from_engine, encode
from tolserve.engine.packs import Pack, PackBusy, PackStore
from tolserve.metrics import Metrics
from tolserve.model.pack import PackError, Target, make_entries, parse_pack

Store = Callable[[int], tuple[PackStore, Metrics]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "packs"
    path.mkdir()
    return path


@pytest.fixture
def store_of(folder: Path, tiny_model_dir: Path) -> Store:
    def make(limit: int = 1 << 30) -> tuple[PackStore, Metrics]:
        metrics = Metrics()
        return PackStore(folder, limit, target_of(tiny_model_dir), torch.device("cpu"), metrics), metrics

    return make


def loaded(store: PackStore) -> list[str]:
    return [view.name for view in store.view() if view.loaded]


def test_packs_leave_for_others_unless_somebody_holds_them(store_of: Store, folder: Path, tiny_model_dir: Path) -> None:
    for name in "abcd":
        save_pack(folder / f"{name}.safetensors", tiny_model_dir, random_changes(tiny_model_dir, 1, range(100)))
    size = (folder / "a.safetensors").stat().st_size
    store, metrics = store_of(2 * size)
    held = store.take(["a"])
    store.give(store.take(["b"]))
    assert loaded(store) == ["a", "b"]
    store.give(store.take(["c"]))  # for which b leaves, though a was used longer ago
    assert loaded(store) == ["a", "c"]
    with pytest.raises(PackBusy, match="--pack-memory"):
        store.take(["c", "d"])
    assert [pack.users for pack in store._loaded.values()] == [1, 0]
    assert store.nbytes == value(metrics, "pack_bytes") <= 2 * size
    assert (value(metrics, "packs_loaded"), value(metrics, "pack_loads_total")) == (2, 3)
    store.give(held)
    store.give(store.take(["c"]))  # a is the one that was used longest ago now
    store.give(store.take(["d"]))
    assert loaded(store) == ["c", "d"]
    small, _ = store_of(size - 1)
    with pytest.raises(PackError, match="--pack-memory") as raised:
        small.take(["a"])
    assert not isinstance(raised.value, PackBusy), "it never fits"
    assert loaded(small) == []


def test_a_file_that_cannot_be_used_costs_nobody_a_place_and_is_read_once(
    store_of: Store, folder: Path, tiny_model_dir: Path
) -> None:
    for name in ("good", "bad"):
        save_pack(folder / f"{name}.safetensors", tiny_model_dir, random_changes(tiny_model_dir, 1, range(100)))
    bad = folder / "bad.safetensors"
    whole = bad.read_bytes()
    fingerprint = target_of(tiny_model_dir).fingerprint.encode()
    bad.write_bytes(whole.replace(fingerprint, b"0" * len(fingerprint)))
    store, _ = store_of(len(whole))
    store.give(store.take(["good"]))
    stamp = bad.stat()
    with pytest.raises(PackError, match="'bad' cannot be used: it was made for other weights"):
        store.take(["bad"])
    assert loaded(store) == ["good"]
    bad.write_bytes(whole)
    os.utime(bad, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # so that only reading it would show
    with pytest.raises(PackError, match="made for other weights"):
        store.take(["bad"])
    os.utime(bad)
    store.give(store.take(["bad"]))
    assert loaded(store) == ["bad"]


def test_a_changed_file_is_loaded_anew_and_requests_keep_theirs(
    store_of: Store, folder: Path, tiny_model_dir: Path
) -> None:
    path = folder / "a.safetensors"
    save_pack(path, tiny_model_dir, {(3, 0): (0.5, torch.zeros(32))})
    store, metrics = store_of()
    (old,) = store.take(["a"])
    assert store.take(["a"]) == (old,)
    save_pack(path, tiny_model_dir, {(4, 1): (2.0, torch.ones(32))})
    (new,) = store.take(["a"])
    assert (old.entries.tokens.tolist(), new.entries.tokens.tolist()) == ([3], [4])
    assert old.digest != new.digest
    assert value(metrics, "packs_loaded") == 2
    store.give([old, old])
    assert value(metrics, "packs_loaded") == 1
    path.unlink()
    with pytest.raises(PackError, match="'a' does not exist"):
        store.take(["a"])
    assert new.entries.tokens.tolist() == [4]
    store.give([new])
    assert value(metrics, "pack_bytes") == value(metrics, "packs_loaded") == 0


@given(
    pairs=st.sets(st.tuples(st.integers(0, 20), st.integers(0, 1)), max_size=20),
    tokens=st.lists(st.integers(0, 25), max_size=12),
)
def test_entries_are_found_by_token(pairs: set[tuple[int, int]], tokens: list[int]) -> None:
    target = Target("f", 30, 2, 4)
    order = sorted(pairs, key=lambda pair: hash((pair, 7)))
    token, layer = (torch.tensor([pair[i] for pair in order], dtype=torch.int32) for i in (0, 1))
    entries = make_entries(token, layer, torch.arange(len(order)).float(), torch.zeros(len(order), 4), target)
    pack = Pack("p", entries, np.zeros(len(order), bool), b"", (0, 0, 0))
    places, found = pack.find(np.array(tokens, np.int64))
    assert [
        (place, int(entries.tokens[e]), int(entries.layers[e]), order[int(entries.scales[e])])
        for place, e in zip(places.tolist(), found.tolist(), strict=True)
    ] == [
        (place, id_, layer_, (id_, layer_))
        for place, id_ in enumerate(tokens)
        for layer_ in (0, 1)
        if (id_, layer_) in pairs
    ]


def good(target: Target) -> dict[str, torch.Tensor]:
    return {
        "tokens": torch.tensor([1, 2, 2], dtype=torch.int32),
        "layers": torch.tensor([0, 0, 1], dtype=torch.int32),
        "scales": torch.ones(3),
        "rows": torch.ones(3, target.hidden_size, dtype=torch.bfloat16),
    }


WORDS = {"tolserve_pack": "1", "description": "a test"}


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        ({"tokens": torch.tensor([1, 2, 300], dtype=torch.int32)}, {}, "token is not in 0..299"),
        ({"tokens": torch.tensor([-1, 2, 3], dtype=torch.int32)}, {}, "token is not"),
        ({"layers": torch.tensor([0, 0, 2], dtype=torch.int32)}, {}, "layer is not in 0..1"),
        ({"layers": torch.tensor([0, 0, 0], dtype=torch.int32)}, {}, "twice"),
        ({"tokens": torch.tensor([1, 2, 2])}, {}, "'tokens' must be I32"),
        ({"scales": torch.ones(2)}, {}, "'scales' must be F32 of 3"),
        ({"scales": torch.tensor([1.0, torch.inf, 1.0])}, {}, "not finite"),
        ({"rows": torch.full((3, 32), torch.nan)}, {}, "not finite"),
        ({"scales": torch.tensor([1.0, -1001, 1.0])}, {}, "not in -1000..1000"),
        ({"rows": torch.ones(3, 31)}, {}, "31 values"),
        ({"rows": torch.ones(3, 32, dtype=torch.float16)}, {}, "'rows' must be BF16 or F32"),
        ({"rows": torch.ones(96)}, {}, "rows"),
        ({"more": torch.ones(1)}, {}, "other tensors"),
        ({}, {"fingerprint": "other"}, "other weights"),
        ({}, {"tolserve_pack": "2"}, "format version"),
        ({}, {"description": "x" * 20_000}, "too long"),
    ],
)
def test_what_is_no_pack_fails_alone(
    store_of: Store, folder: Path, tiny_model_dir: Path, changed: dict[str, Any], words: dict[str, str], message: str
) -> None:
    target = target_of(tiny_model_dir)
    metadata = WORDS | {"fingerprint": target.fingerprint}
    save_file(good(target), folder / "good.safetensors", metadata)
    save_file(good(target) | changed, folder / "bad.safetensors", metadata | words)
    store, _ = store_of()
    (pack,) = store.take(["good"])
    assert (pack.entries.rows.dtype, pack.adds.tolist()) == (torch.bfloat16, [True] * 3)
    with pytest.raises(PackError, match="the pack 'bad' cannot be used") as raised:
        store.take(["good", "bad"])
    assert message in str(raised.value)
    assert pack.users == 1
    assert [view.name for view in store.view()] == ["bad", "good"]
    assert store.view()[1].problem is None
    assert store.view()[1].entries == 3


TENSOR = {"dtype": "F32", "shape": [3], "data_offsets": [0, 1]}
ROWS = TENSOR | {"shape": [3, 32]}
SHAPES = {"tokens": TENSOR | {"dtype": "I32"}, "layers": TENSOR | {"dtype": "I32"}, "scales": TENSOR}


@pytest.mark.parametrize(
    "header",
    [
        "[" * 16_000,
        json.dumps({"__metadata__": WORDS | {"fingerprint": "F"}}),
        json.dumps({"__metadata__": WORDS | {"fingerprint": "F", "description": "\ud800"}} | SHAPES),
        json.dumps({"__metadata__": WORDS | {"fingerprint": "\ud800"}} | SHAPES | {"rows": ROWS}),
        *(
            json.dumps({"__metadata__": WORDS | {"fingerprint": "F"}} | each)
            for shape in ([2**65], [True], ["3"], [-3], [[]], {})
            for each in [{name: TENSOR | {"shape": shape} for name in SHAPES} | {"rows": ROWS}]
        ),
        *(
            json.dumps({"__metadata__": WORDS | {"fingerprint": "F"}} | SHAPES | {"rows": TENSOR | {"shape": shape}})
            for shape in ([3, 2**65], [3, True], [3, 31], [3, -1], [3, 1.5], [3, None], [2**40, 32])
        ),
    ],
)
def test_a_header_of_any_kind_can_be_listed(store_of: Store, folder: Path, tiny_model_dir: Path, header: str) -> None:
    """And said to the API, and refused by name."""
    data = header.replace('"F"', f'"{target_of(tiny_model_dir).fingerprint}"').encode()
    (folder / "bad.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(3 * (12 + 4 * 32)))
    store, _ = store_of()
    (view,) = store.view()
    assert view.problem is not None
    assert decode_from_engine(encode(Packs([view], None))) == Packs([view], None)
    with pytest.raises(PackError, match="'bad' cannot be used"):
        store.take(["bad"])


@settings(max_examples=150)
@given(data=st.data())
def test_no_bytes_do_more_than_fail(data: st.DataObject) -> None:
    """Damaged, cut off, or made up: a PackError, never anything else."""
    target = Target("f" * 32, 300, 2, 32)
    whole = bytearray(save(good(target), WORDS | {"fingerprint": target.fingerprint}))
    match data.draw(st.sampled_from(["flip", "cut", "length", "noise"])):
        case "flip":
            for _ in range(data.draw(st.integers(1, 4))):
                whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del whole[data.draw(st.integers(0, len(whole) - 1)) :]
        case "length":
            whole[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        case "noise":
            whole = bytearray(data.draw(st.binary(max_size=200)))
    try:
        entries = parse_pack(bytes(whole), target)
    except PackError:
        return
    assert entries.rows.isfinite().all()


def test_a_header_nested_without_end_is_no_pack(store_of: Store, folder: Path) -> None:
    (folder / "deep.safetensors").write_bytes(struct.pack("<Q", 15_000) + b"[" * 15_000)
    store, _ = store_of()
    with pytest.raises(PackError, match="it is no pack"):
        store.take(["deep"])
    assert "it is no pack" in str(store.view()[0].problem)


def test_only_files_of_the_folder_are_packs(store_of: Store, folder: Path, tiny_model_dir: Path) -> None:
    changes: Changes = {}
    save_pack(folder.parent / "outside.safetensors", tiny_model_dir, changes)
    (folder / "inner.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    store, _ = store_of()
    for name in ("../outside", "/etc/passwd", "inner", "pipe", "", "..", "a\0b", "x" * 101, "é"):
        with pytest.raises(PackError, match="does not exist"):
            store.take([name])
    assert [view.name for view in store.view() if view.problem is None] == []
