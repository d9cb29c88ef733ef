"""Tables of random records at any shape, for what measures speed.

Paging does not look into records; they only have to differ. Values are of the size of N(0, 0.02^2) all the same, in
every encoding, since models are run over them. A table that is there already is opened, not written again.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tolserve.model.config import ModelConfig
from tolserve.study.report import StudyError
from tolserve.tol.encoding import BF16, GROUP_SIZE, SCALE_BYTES, Encoding, Values
from tolserve.tol.table import Bytes, Manifest, Table
from tolserve.tol.writer import TableWriter

# Records are windows into one block of noise; this many different ones, then they repeat under other checksums.
WINDOWS = 8191
BATCH_BYTES = 64 << 20


def random_table(
    path: Path, *, vocab_size: int, num_layers: int, hidden_size: int, encoding: Encoding = BF16, **options: Any
) -> Table:
    """The table of random records at `path`, written now unless one is there; further `options` are TableWriter's.

    Raises StudyError when what is there is a table of another shape.
    """
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "encoding": encoding,
    }
    if path.exists():
        table = Table.open(path)
        if any(getattr(table.manifest, name) != value for name, value in shape.items()):
            raise StudyError(f"{path} holds a table of another shape than {shape}; name another folder")
        return table
    writer = TableWriter(path, fingerprint="random", **(shape | options))
    try:
        for records in _records(writer.manifest):
            writer.write(records)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    return Table.open(path)


def table_of(folder: Path, values: Values, config: ModelConfig) -> Table:
    """The table of this encoding in a folder of tables, for this model; written now unless it is there."""
    encoding = Encoding(values, None if values == "bf16" else GROUP_SIZE)
    names = {"vocab_size": config.vocab_size, "num_layers": config.num_hidden_layers}
    return random_table(folder / values, hidden_size=config.hidden_size, encoding=encoding, **names)


def _records(manifest: Manifest) -> Iterator[Bytes]:
    """All records in order, uint8 [n, record_bytes] at a time."""
    size = manifest.record_bytes
    noise, step = _noise(manifest)
    scales = _scale_columns(manifest)
    batch = max(1, BATCH_BYTES // size)
    for first in range(0, manifest.vocab_size, batch):
        starts = (token % WINDOWS * step for token in range(first, min(first + batch, manifest.vocab_size)))
        records = np.stack([noise[start : start + size] for start in starts])
        if len(scales):
            records[:, scales] = np.resize(_scale(manifest.encoding.values), len(scales))
        yield records


def _noise(manifest: Manifest) -> tuple[Bytes, int]:
    """What records are windows into, and how many bytes lie from one window to the next."""
    size, rng = manifest.record_bytes, np.random.default_rng(1)
    if manifest.encoding.values == "bf16":
        values = rng.standard_normal(size // 2 + WINDOWS, np.float32) * np.float32(0.02)
        return _bf16(values), 2
    if manifest.encoding.values == "int8":
        return rng.integers(-127, 128, size + WINDOWS, np.int8).view(np.uint8), 1
    return rng.integers(0, 256, size + WINDOWS, np.uint8), 1


def _scale(values: Values) -> Bytes:
    """Makes integers as large as N(0, 0.02^2): those of int8 have a deviation of 73, of int4 4.6."""
    return _bf16(np.array([0.02 / (73 if values == "int8" else 4.6)], np.float32))


def _bf16(values: NDArray[np.float32]) -> Bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _scale_columns(manifest: Manifest) -> NDArray[np.intp]:
    """The bytes of a record that hold scales, in order."""
    group_size = manifest.encoding.group_size
    if group_size is None:
        return np.empty(0, np.intp)
    columns = []
    for layer in manifest.layers:
        group, row = manifest.row_layout(layer)
        end = manifest.groups[group].offset + row.offset + manifest.encoding.row_bytes(row.width)
        columns.append(np.arange(end - SCALE_BYTES * row.width // group_size, end))
    return np.concatenate(columns)
