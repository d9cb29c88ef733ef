"""Tables of random bytes, and the slow obvious way to look at them."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tolserve.metrics import Metrics
from tolserve.tol.pager import Lease, Pager
from tolserve.tol.table import Bytes, Table
from tolserve.tol.writer import TableWriter

Records = npt.NDArray[np.uint8]
RECORD_BYTES = {"page": 4096, "padded": 8064, "packed": 1536}  # one page; 1.6% of padding; padding would waste 62%
SHAPES = {"page": (2, 1024), "padded": (3, 1344), "packed": (3, 256)}  # (layers, hidden_size)
GROUPED = {"grouped": (9, 224)}  # layers enough for two groups: 3 x 448 and 6 x 448 bytes


def random_records(vocab_size: int, record_bytes: int, seed: int = 0) -> Records:
    return np.random.default_rng(seed).integers(0, 256, (vocab_size, record_bytes), np.uint8)


def make_table(
    path: Path, vocab_size: int = 40, shape: str = "packed", shard_bytes: int = 1 << 30, seed: int = 0
) -> tuple[Table, Records]:
    """A table of random records, and the records [vocab_size, record_bytes]."""
    layers, hidden_size = (SHAPES | GROUPED)[shape]
    records = random_records(vocab_size, layers * hidden_size * 2, seed)
    writer = TableWriter(
        path,
        vocab_size=vocab_size,
        num_layers=layers,
        hidden_size=hidden_size,
        fingerprint="f" * 32,
        shard_bytes=shard_bytes,
    )
    writer.write(records)
    writer.finish()
    return Table.open(path), records


@contextlib.contextmanager
def open_pager(table: Table, device_slots: int, host_slots: int = 0, **options: Any) -> Iterator[tuple[Pager, Metrics]]:
    metrics = Metrics()
    if isinstance(table, HeldTable):
        options.setdefault("io", "buffered")
    pager = Pager(table, device_slots=device_slots, host_slots=host_slots, device="cpu", metrics=metrics, **options)
    try:
        yield pager, metrics
    finally:
        pager.close()


class HeldTable(Table):
    """A table whose reads wait while they are held: what is on its way stays on its way.

    For buffered reads, which are checked in threads: asynchronous ones are checked by whoever asks for them.
    """

    def __init__(self, table: Table) -> None:
        super().__init__(table.path, table.manifest, table.checksums)
        self._go = threading.Event()
        self._go.set()

    def check(self, token: int, payload: Bytes, groups: range | None = None) -> None:
        self._go.wait(60)
        super().check(token, payload, groups)

    @contextlib.contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Until the event is set, or the context ends."""
        self._go.clear()
        try:
            yield self._go
        finally:
            self._go.set()


def bytes_in(pager: Pager, lease: Lease, token: int) -> Records:
    """What lies in the slots that a lease gives a token, uint8 [record_bytes]."""
    parts = zip(pager.parts, lease.slots, strict=True)
    return np.concatenate([part.arena.data[slots[token], : part.bytes].numpy() for part, slots in parts])


def assert_bytes(pager: Pager, lease: Lease, records: Records) -> None:
    """Every record of a lease is the table's."""
    for token in lease.tokens:
        assert np.array_equal(bytes_in(pager, lease, token), records[token]), f"token {token}"


def value(metrics: Metrics, name: str, *labels: str) -> float:
    """A counter or gauge; without labels, the sum over all of its series."""
    (metric,) = [metric for metric in metrics.snapshot() if metric.name == f"tolserve_{name}"]
    return sum(sample.value for sample in metric.samples if not labels or sample.labels == labels)


def shard_file(table: Table, token: int) -> tuple[Path, int]:
    """The file with a token's record, and where in it the record starts."""
    index, offset = table.locate(token)
    return table.path / table.manifest.shards[index].file, offset


def flip_byte(table: Table, token: int, at: int = 5) -> None:
    """Change one byte of a record on disk; a second time changes it back."""
    path, offset = shard_file(table, token)
    with path.open("r+b") as file:
        file.seek(offset + at)
        (byte,) = file.read(1)
        file.seek(offset + at)
        file.write(bytes([byte ^ 0x40]))
