"""What a server keeps of the tokens that it ran: counts for a warm restart, and, where asked for, a trace to replay.

The engine thread only hands over token ids. A thread of its own writes: a full or slow disk must not hold a step.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tolserve.tol.files import replacing
from tolserve.tol.frequencies import Counts, FrequencyError, read_frequencies, write_frequencies

log = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

# What earlier runs counted weighs at most this many tokens at a start, so that old habits fade. The most frequent 4,096
# of 2 million tokens of mixed English (V = 128,256) cover 80.7% of other text, those of 1 million 80.3%, of 3 million
# 80.9%. A bound, and not a half at each start: a server that starts often, without traffic between, forgets nothing.
PAST_TOKENS = 2_000_000
# Tokens are counted in batches of this many: one at a time, numpy takes longer than a small model's step.
BATCH = 4096
# A server that is killed forgets what it counted since. A save of 128,256 counts takes 10 ms of this module's thread.
SAVE_SECONDS = 120.0

# 8 Mi tokens are 32 MiB on disk; the policies were chosen on a trace of 6 million.
MAX_TRACE_TOKENS = 1 << 23
# Ended sequences wait in RAM until they are written, so long and, if the disk stands still, so many tokens at most.
FLUSH_SECONDS = 2.0
MAX_WAITING_TOKENS = 1 << 20
# Token ids are what users wrote.
PRIVATE = 0o600

_MAGIC = 0x54524331  # a part file begins with this and the vocabulary's size
_END = -1  # follows each sequence of a part file


class RecorderError(ValueError):
    """A file that cannot be recorded into; the message names it and says what to do."""


class CountFile:
    """Counts every token that runs, on top of what earlier runs left at `path`, or else of `past`."""

    def __init__(self, path: Path, past: Counts) -> None:
        """Writes once, so that a path that cannot be written is known now. Raises RecorderError."""
        try:
            if path.exists():
                past = read_frequencies(path, len(past))
            self._counts = faded(past)
            self._path = path
            self._pending: list[int] = []
            self._lock = threading.Lock()
            self.save()
        except FrequencyError as error:
            raise RecorderError(f"{error}; it is not overwritten") from error
        except OSError as error:
            raise RecorderError(f"token counts cannot be saved to {path}: {error}") from error

    def add(self, tokens: Sequence[int]) -> None:
        """Each must lie in the vocabulary."""
        with self._lock:
            self._pending.extend(tokens)
            if len(self._pending) >= BATCH:
                self._fold()

    def _fold(self) -> None:
        np.add.at(self._counts, self._pending, 1)
        self._pending.clear()

    def counts(self) -> Counts:
        """A copy of the counts as they are now."""
        with self._lock:
            if self._pending:
                self._fold()
            return self._counts.copy()

    def save(self) -> None:
        """Raises OSError; then the last save is still there."""
        write_frequencies(self._path, self.counts(), PRIVATE)


def faded(counts: Counts) -> Counts:
    """As they are up to PAST_TOKENS in sum, else scaled down to that; what then falls below 1 is forgotten."""
    total = int(counts.sum())
    return counts.copy() if total <= PAST_TOKENS else (counts * (PAST_TOKENS / total)).astype(np.int64)


class TraceFile:
    """A trace that grows: sequences are appended to `path`.part, which `finish` turns into `path`.

    A part that a killed server left is continued. One process at a time.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Raises RecorderError for a trace that is there already, and for a path that cannot be written."""
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._vocab_size = vocab_size
        if path.exists():
            raise RecorderError(f"{path} exists and is not overwritten; move it away or name another file")
        try:
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
        except OSError as error:
            raise RecorderError(f"no trace can be recorded at {path}: {error}") from error
        try:
            self.tokens = self._continue()
        except BaseException:
            os.close(self._fd)
            raise
        self.stopped = False

    def _continue(self) -> int:
        """Take over the whole sequences that are there; returns their tokens."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
            head = np.array([_MAGIC, self._vocab_size], "<i4")
            if not os.fstat(self._fd).st_size:
                os.write(self._fd, head.tobytes())
            found, body = np.split(np.fromfile(self._part, "<i4"), [2])
            if found.tolist() != head.tolist():
                raise RecorderError(f"{self._part} is no part of a trace of this vocabulary; move it away")
            os.fchmod(self._fd, PRIVATE)
            ends = np.flatnonzero(body == _END)
            whole = int(ends[-1]) + 1 if len(ends) else 0
            os.ftruncate(self._fd, 4 * (len(head) + whole))
            os.lseek(self._fd, 0, os.SEEK_END)
        except BlockingIOError as error:
            raise RecorderError(f"another server records to {self._path}; name another file") from error
        except OSError as error:
            raise RecorderError(f"no trace can be recorded at {self._path}: {error}") from error
        return whole - len(ends)

    def append(self, sequences: Sequence[Tokens]) -> None:
        """Stops for good, and says so, at MAX_TRACE_TOKENS and when the disk takes no more."""
        for tokens in sequences:
            if self.stopped:
                return
            if self.tokens + len(tokens) > MAX_TRACE_TOKENS:
                self._stop(f"it holds {self.tokens} tokens and may hold {MAX_TRACE_TOKENS}")
                return
            data = memoryview(np.append(tokens, _END).astype("<i4").tobytes())
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except OSError as error:
                self._stop(str(error))  # half a sequence may be there; nothing follows it, so that it is cut off
                return
            self.tokens += len(tokens)

    def _stop(self, why: str) -> None:
        self.stopped = True
        log.warning("the trace %s is recorded no further: %s", self._path, why)

    def finish(self) -> None:
        """Write `path` and remove the part. Raises OSError; then the part is still there. Nothing recorded, no file."""
        body = np.fromfile(self._part, "<i4", offset=8)
        ends = np.flatnonzero(body == _END)
        if len(ends):
            body = body[: ends[-1] + 1]
            offsets = np.concatenate([[0], ends - np.arange(len(ends))])
            if self._path.exists():
                raise FileExistsError(f"{self._path} has come into being; the trace stays in {self._part}")
            with replacing(self._path, PRIVATE) as file:
                np.savez(file, tokens=body[body != _END], offsets=offsets, vocab_size=np.int64(self._vocab_size))
        self._part.unlink()

    def close(self) -> None:
        os.close(self._fd)


class Recorder:
    """Takes tokens from the engine thread and writes them from a thread of its own."""

    def __init__(self, counts: CountFile | None, trace: TraceFile | None) -> None:
        self._counts, self._trace = counts, trace
        self._waiting: list[Tokens] = []  # ended sequences that are not in the file yet
        self._waiting_tokens = 0
        self._missing = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def counts(self) -> Counts | None:
        """Those that it keeps, as they are now; None if it keeps none."""
        return self._counts.counts() if self._counts is not None else None

    def runs(self, tokens: Sequence[int]) -> None:
        """A step runs these tokens, each as often as it is in the batch."""
        if self._counts is not None:
            self._counts.add(tokens)

    def ended(self, tokens: Sequence[int]) -> None:
        """A sequence is over, finished or not; these of its tokens were run, in this order, the last ones perhaps in a
        step that failed."""
        if self._trace is None or self._trace.stopped or not tokens:
            return
        with self._lock:
            if self._waiting_tokens + len(tokens) <= MAX_WAITING_TOKENS:
                self._waiting.append(np.array(tokens, np.int32))
                self._waiting_tokens += len(tokens)
            elif not self._missing:
                self._missing = True
                log.warning("sequences are missing in the trace: the disk does not take what waits for it")

    def _work(self) -> None:
        since_save = 0.0
        while not self._closing.wait(FLUSH_SECONDS):
            self._flush()
            if (since_save := since_save + FLUSH_SECONDS) >= SAVE_SECONDS:
                since_save = 0.0
                self._save()

    def _flush(self) -> None:
        if self._trace is not None:
            with self._lock:
                sequences, self._waiting, self._waiting_tokens = self._waiting, [], 0
            self._trace.append(sequences)

    def _save(self) -> None:
        if self._counts is not None:
            try:
                self._counts.save()
            except OSError as error:
                log.warning("token counts could not be saved: %s", error)

    def close(self, *, finish: bool) -> None:
        """Write what is left. `finish` turns the part of a trace into the trace: not after a fault, since the next
        engine goes on with it. A second time does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self._flush()
        self._save()
        if self._trace is not None:
            try:
                if finish:
                    self._trace.finish()
            except OSError as error:
                log.error("the trace could not be finished: %s", error)
            self._trace.close()
