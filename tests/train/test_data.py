"""Training text: reading it, and cutting it into sequences in an order that a seed fixes."""

import bz2
import gzip
import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tolserve.train.data import DataError, Sequences, Tokens, read_documents, read_tokens, tokenise
from tolserve.train.tokenizer import END_OF_TEXT

DOCUMENTS = ["one\nparagraph", "", 'another, with "quotes" and 漢字 🙂']


def write(path: Path, content: bytes) -> Path:
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    return path


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz"])
def test_each_line_of_a_jsonl_is_a_document(tmp_path: Path, suffix: str) -> None:
    assert list(read_documents(write(tmp_path / f"a.{suffix}", jsonl(DOCUMENTS)))) == DOCUMENTS


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.xz"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    assert list(read_documents(write(tmp_path / f"a.b.{suffix}", "two\nlines é".encode()))) == ["two\nlines é"]


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.parquet.gz", "a.jsonl.zst", "a.npy"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"\.jsonl or \.txt"):
        list(read_documents(write(tmp_path / name, b"x")))


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', "{}", '{"text": 3}', '{"text": null}', "", r'{"text": "half \ud83d"}']
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(["good"]) + line.encode() + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        list(read_documents(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(DOCUMENTS * 100))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "plain.jsonl.xz").write_bytes(b"not xz")
    (tmp_path / "cut.jsonl.xz").write_bytes(lzma.compress(jsonl(DOCUMENTS * 100))[:-20])
    (tmp_path / "cut.jsonl.bz2").write_bytes(bz2.compress(jsonl(DOCUMENTS * 100))[:-20])
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2 :] = b"\xff" * (len(whole) - len(whole) // 2)
    (tmp_path / "spoilt.jsonl.gz").write_bytes(spoilt)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name in ("latin.txt", "missing.txt", *(path.name for path in tmp_path.glob("*.jsonl.*"))):
        with pytest.raises(DataError, match=name):
            list(read_documents(tmp_path / name))


def test_documents_follow_each_other_each_behind_a_separator(tmp_path: Path, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = tokenise(write(tmp_path / "a.jsonl", jsonl(DOCUMENTS)), tokenizer, end)
    assert stream.dtype == np.int32
    starts = np.flatnonzero(stream == end)
    assert len(starts) == len(DOCUMENTS)
    assert [tokenizer.decode(part[1:]) for part in np.split(stream, starts)[1:]] == DOCUMENTS
    assert len(tokenise(write(tmp_path / "empty.jsonl", b""), tokenizer, end)) == 0


@pytest.mark.parametrize("group", [1, 12, 1 << 20])
def test_documents_are_tokenised_in_groups_as_each_alone(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr("tolserve.train.data.GROUP", group)
    texts = ["", "a few words", "more of them, and more", "", "x", "y"]
    ids = [token for text in texts for token in [7, *tokenizer.encode(text).ids]]
    assert tokenise(write(tmp_path / "a.jsonl", jsonl(texts)), tokenizer, 7).tolist() == ids


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_token_files_are_streams_of_ids(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.array([3, 0, 299], dtype))
    assert read_tokens(tmp_path / "a.npy", 300).tolist() == [3, 0, 299]
    (batch,) = itertools.islice(Sequences((read_tokens(tmp_path / "a.npy", 300),), 2, 0).batches(1, 0), 1)
    assert batch.dtype == np.int32


def test_a_token_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "wide.npy", np.zeros((2, 3), np.int32))
    np.save(tmp_path / "float.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "large.npy", np.array([0, 300]))
    np.save(tmp_path / "negative.npy", np.array([-1, 3]))
    for path in [*tmp_path.glob("*.npy"), tmp_path / "missing.npy"]:
        with pytest.raises(DataError, match=path.name):
            read_tokens(path, 300)


streams = st.lists(st.integers(0, 60), min_size=1, max_size=4)


def numbered(lengths: list[int]) -> tuple[Tokens, ...]:
    """Streams whose tokens all differ, so that a sequence shows where it was cut."""
    return tuple(np.arange(n, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths))


@given(lengths=streams, length=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_token_is_a_target_once(lengths: list[int], length: int, seed: int) -> None:
    """But for a stream's first token, which nothing predicts, and a rest shorter than a sequence."""
    sequences = Sequences(numbered(lengths), length, seed)
    order = sequences.order()
    targets = [1000 * i + start + 1 + offset for i, start in order.tolist() for offset in range(length)]
    expected = [1000 * i + t for i, n in enumerate(lengths) for t in range(1, 1 + (n - 1) // length * length)]
    assert sorted(targets) == expected
    assert order[:, 0].tolist() == sorted(order[:, 0])  # one file after the other


@given(lengths=streams, length=st.integers(1, 9), batch=st.integers(1, 5), skip=st.integers(0, 40))
def test_a_later_start_continues_the_same_order(lengths: list[int], length: int, batch: int, skip: int) -> None:
    sequences = Sequences(numbered(lengths), length, seed=3)
    if not len(sequences.order()):
        return
    whole, later = sequences.batches(batch, 0), Sequences(numbered(lengths), length, seed=3).batches(batch, skip)
    for _ in range(skip):
        next(whole)
    for _ in range(3):
        expected, found = next(whole), next(later)
        assert found.shape == (batch, length + 1)
        assert np.array_equal(found, expected)
        assert (np.diff(found, axis=1) == 1).all()  # consecutive tokens of one stream


def test_the_text_begins_again_when_it_is_used_up() -> None:
    sequences = Sequences(numbered([41]), length=10, seed=0)
    batches = sequences.batches(3, 0)
    seen = np.concatenate([next(batches) for _ in range(4)])[:, 0].tolist()
    assert seen == seen[:4] * 3
    assert sorted(seen[:4]) == [0, 10, 20, 30]


def test_the_order_depends_on_the_seed() -> None:
    orders = [Sequences(numbered([400]), 4, seed).order().tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="shorter"):
        next(Sequences(numbered([5, 4]), 5, 0).batches(1, 0))
