"""What is kept of the tokens that ran: real files, real kills, and what `table replay` reads of them."""

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e.conftest import environment
from tolserve.tol import recorder
from tolserve.tol.files import replacing
from tolserve.tol.frequencies import read_frequencies, write_frequencies
from tolserve.tol.recorder import PAST_TOKENS, CountFile, Recorder, RecorderError, TraceFile, faded
from tolserve.tol.replay import Trace, interleave

VOCAB = 10
NOTHING = np.zeros(VOCAB, np.int64)

documents = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8), max_size=8)


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def texts_of(path: Path) -> list[list[int]]:
    trace = Trace.load(path)
    assert trace.vocab_size == VOCAB
    return [trace.documents([d]).tokens.tolist() for d in range(len(trace.offsets) - 1)]


def record(path: Path, texts: list[list[int]], *, finish: bool = True) -> None:
    keeper = Recorder(None, TraceFile(path, VOCAB))
    for text in texts:
        keeper.ended(text)
    keeper.close(finish=finish)


@given(st.lists(documents, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_trace_holds_every_sequence_of_every_engine_that_went_on_with_it(
    tmp_path_factory: pytest.TempPathFactory, runs: list[list[list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    for run in runs:
        record(path, run, finish=False)  # as after a fault
    record(path, [])
    whole = [text for run in runs for text in run]
    if not whole:
        assert not list(path.parent.iterdir())
        return
    assert texts_of(path) == whole
    assert [file.name for file in path.parent.iterdir()] == ["trace.npz"]
    assert len(interleave(Trace.load(path), 2)) > 0


def test_users_texts_are_for_the_servers_user_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        part_of(tmp_path / "t.npz").touch(0o666)
        record(tmp_path / "t.npz", [[1, 2]], finish=False)
        assert part_of(tmp_path / "t.npz").stat().st_mode & 0o777 == 0o600
        record(tmp_path / "t.npz", [])
        CountFile(tmp_path / "c.npz", NOTHING)
    finally:
        os.umask(old)
    assert {(p.name, p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {("t.npz", 0o600), ("c.npz", 0o600)}


@pytest.mark.parametrize("cut", [1, 2, 4, 7, 8, 11])
def test_a_write_that_was_cut_off_loses_that_sequence_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "t.npz"
    record(path, [[1, 2], [3], [4, 5]], finish=False)
    part = part_of(path)
    with part.open("r+b") as file:
        file.truncate(part.stat().st_size - cut)
    record(path, [[6]])
    assert texts_of(path) == [[1, 2], [3], [6]]


def test_a_trace_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    record(path, [[1]])
    before = path.read_bytes()
    with pytest.raises(RecorderError, match=r"t\.npz exists and is not overwritten"):
        TraceFile(path, VOCAB)
    path.unlink()
    keeper = Recorder(None, TraceFile(path, VOCAB))
    keeper.ended([2])
    path.write_bytes(before)  # somebody puts it back meanwhile
    keeper.close(finish=True)
    assert path.read_bytes() == before
    path.unlink()
    record(path, [])
    assert texts_of(path) == [[2]]


def test_what_is_no_part_of_this_trace_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    for text in (b"x", b"something else altogether"):
        part_of(path).write_bytes(text)
        with pytest.raises(RecorderError, match="no part of a trace of this vocabulary; move it away"):
            TraceFile(path, VOCAB)
        assert part_of(path).read_bytes() == text
    part_of(path).unlink()
    record(path, [[1]], finish=False)
    with pytest.raises(RecorderError, match="this vocabulary"):
        TraceFile(path, VOCAB + 1)
    record(path, [])
    assert texts_of(path) == [[1]]


def test_two_servers_do_not_share_a_trace(tmp_path: Path) -> None:
    first = TraceFile(tmp_path / "t.npz", VOCAB)
    with pytest.raises(RecorderError, match="another server records to"):
        TraceFile(tmp_path / "t.npz", VOCAB)
    first.close()
    TraceFile(tmp_path / "t.npz", VOCAB).close()


def test_a_trace_stops_at_its_bound_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "MAX_TRACE_TOKENS", 5)
    path = tmp_path / "t.npz"
    record(path, [[1, 2]], finish=False)
    record(path, [[3, 4, 5], [6], [7]])
    assert texts_of(path) == [[1, 2], [3, 4, 5]]
    assert len(caplog.records) == 1
    assert "recorded no further: it holds 5 tokens and may hold 5" in caplog.text


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses every write beyond so many bytes of a file, as a full disk does."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_ends_the_trace_and_spoils_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.npz"
    keeper = Recorder(None, TraceFile(path, VOCAB))
    keeper.ended([1, 2, 3])
    keeper.ended([4] * 50)
    keeper.ended([5])
    with files_of_at_most(100):
        keeper.close(finish=False)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "recorded no further: [Errno 27]" in caplog.text
    assert part_of(path).stat().st_size == 100, "the fault did not happen"
    record(path, [[6]])
    assert texts_of(path) == [[1, 2, 3], [6]]


def test_what_waits_for_a_slow_disk_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recorder, "MAX_WAITING_TOKENS", 4)
    record(tmp_path / "t.npz", [[1, 2], [3, 4], [5], [6]])
    assert texts_of(tmp_path / "t.npz") == [[1, 2], [3, 4]]
    assert len(caplog.records) == 1


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=20), max_size=8), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_every_token_that_runs_is_counted_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[list[int]], batch: int
) -> None:
    path = tmp_path_factory.mktemp("counts") / "counts.npz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "BATCH", batch)
        keeper = Recorder(CountFile(path, np.full(VOCAB, 2)), None)
        for step in steps:
            keeper.runs(step)
        keeper.close(finish=True)
    expected = [2 + sum(step.count(token) for step in steps) for token in range(VOCAB)]
    assert read_frequencies(path, VOCAB).tolist() == expected
    assert [file.name for file in path.parent.iterdir()] == ["counts.npz"]


def test_counts_go_on_where_the_last_run_left_them_and_old_ones_fade(tmp_path: Path) -> None:
    path = tmp_path / "counts.npz"
    for _ in range(5):  # starts without traffic change nothing
        CountFile(path, np.arange(VOCAB))
    assert read_frequencies(path, VOCAB).tolist() == list(range(VOCAB))
    counts = np.arange(VOCAB) * PAST_TOKENS
    assert faded(counts).sum() == pytest.approx(PAST_TOKENS, abs=VOCAB)
    assert (np.diff(faded(counts)) > 0).all()
    assert faded(np.array([10 * PAST_TOKENS, 9])).tolist()[1] == 0
    write_frequencies(path, counts)
    CountFile(path, NOTHING)
    assert read_frequencies(path, VOCAB).tolist() == faded(counts).tolist()


def test_a_path_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "novel.npz").write_text("It was a cold evening")
    with pytest.raises(RecorderError, match="cannot be saved to .*nowhere"):
        CountFile(tmp_path / "nowhere" / "counts.npz", NOTHING)
    with pytest.raises(RecorderError, match="cannot be saved to"):
        CountFile(tmp_path / "file" / "counts.npz", NOTHING)
    with pytest.raises(RecorderError, match="no frequency list.*not overwritten"):
        CountFile(tmp_path / "novel.npz", NOTHING)
    with pytest.raises(RecorderError, match="not overwritten"):
        CountFile(tmp_path, NOTHING)
    with pytest.raises(RecorderError, match="no trace can be recorded at .*nowhere"):
        TraceFile(tmp_path / "nowhere" / "t.npz", VOCAB)
    assert (tmp_path / "novel.npz").read_text() == "It was a cold evening"


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "counts.npz"
    keeper = Recorder(CountFile(path, np.arange(VOCAB)), None)
    keeper.runs([0])
    with files_of_at_most(20):
        keeper.close(finish=True)
    assert "token counts could not be saved: [Errno 27]" in caplog.text
    assert read_frequencies(path, VOCAB).tolist() == list(range(VOCAB))
    assert [file.name for file in tmp_path.iterdir()] == ["counts.npz"]


def write_half(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise RuntimeError("no more")


def test_a_block_that_fails_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="no more"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import sys, time
import numpy as np
from pathlib import Path
from tolserve.tol import recorder
recorder.FLUSH_SECONDS = recorder.SAVE_SECONDS = 0.05
folder = Path(sys.argv[1])
keeper = recorder.Recorder(
    recorder.CountFile(folder / "counts.npz", np.zeros(10, np.int64)), recorder.TraceFile(folder / "t.npz", 10)
)
for _ in range(100):
    keeper.runs([1, 2, 2])
    keeper.ended([1, 2, 2])
    time.sleep(0.002)
print("done", flush=True)
time.sleep(60)
"""


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_was_written_survives_a_kill(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(argv, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
            size = 8 + 100 * 4 * 4
            eventually(lambda: part_of(tmp_path / "t.npz").stat().st_size == size)
            eventually(lambda: int(read_frequencies(tmp_path / "counts.npz", VOCAB).sum()) == 300)
        finally:
            process.kill()
    record(tmp_path / "t.npz", [])
    assert texts_of(tmp_path / "t.npz") == [[1, 2, 2]] * 100
    assert read_frequencies(tmp_path / "counts.npz", VOCAB).tolist()[:3] == [0, 100, 200]
