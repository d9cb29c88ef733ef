"""The table file: written once, opened in milliseconds, read record by record.

Layout: token-major shards of one `U8` tensor `records [tokens, record_stride]` each; a record holds its layers' rows
one after another, encoded as tol/encoding.py says. The checksum of (record, group) is the CRC-32 of the group's bytes
started from the token id, so that a record in the wrong place is caught too.
"""

import os
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tolserve.tol.factors import Bits, check_factors, read_factors
from tolserve.tol.manifest import (
    CHECKSUMS,
    FACTORS,
    FORMAT_VERSION,
    LAYOUT,
    MANIFEST,
    Manifest,
    TableError,
    file_metadata,
    read_header,
)

# The same CRC-32, 4 us instead of 25 us for a record of 98,304 bytes: a lone read is delivered after 161 us instead of
# 247 us. Optional, since the engine also runs on machines that have little more than torch.
try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["ErrorKind", "Manifest", "RecordError", "Table", "TableError", "describe", "verify"]

Bytes = NDArray[np.uint8]
ErrorKind = Literal["io", "short", "checksum"]
ERROR_KINDS: tuple[ErrorKind, ...] = ("io", "short", "checksum")

# `verify` names this many bad tokens; the count says the rest.
_NAMED = 8


class RecordError(RuntimeError):
    """One record that could not be had: `io` (the system's error), `short` (the file ends before it) or `checksum`."""

    def __init__(self, token: int, kind: ErrorKind, message: str) -> None:
        super().__init__(f"record of token {token}: {message}")
        self.token = token
        self.kind: ErrorKind = kind


class Table:
    """An open table: manifest and checksums, no data. Immutable; may be shared by threads.

    `checksums` is uint32 [vocab_size, groups].
    """

    def __init__(self, path: Path, manifest: Manifest, checksums: NDArray[np.uint32]) -> None:
        self.path = path
        self.manifest = manifest
        self.checksums = checksums
        self._first_tokens = [shard.first_token for shard in manifest.shards]

    @classmethod
    def open(cls, path: Path) -> "Table":
        """Read the manifest, the shards' headers and the checksums (4 bytes per record and group).

        Raises TableError when anything of it is missing, malformed or in disagreement with a file's length.
        """
        manifest = Manifest.load(path)
        for shard in manifest.shards:
            shape = (shard.tokens, manifest.record_stride)
            data_start, metadata = read_header(path / shard.file, "records", "U8", shape)
            if data_start != shard.data_start or metadata != file_metadata(manifest.fingerprint, shard.first_token):
                raise TableError(f"{path / shard.file} is a shard of another table")
        shape = (manifest.vocab_size, len(manifest.groups))
        file = path / CHECKSUMS
        data_start, metadata = read_header(file, "checksums", "U32", shape)
        if metadata != file_metadata(manifest.fingerprint, 0):
            raise TableError(f"{file} belongs to another table")
        try:
            checksums = np.fromfile(file, dtype="<u4", offset=data_start)
        except OSError as error:
            raise TableError(f"{file} cannot be read: {error}") from error
        if manifest.encoding.ranks is not None:
            check_factors(path, manifest)
        if checksums.size != shape[0] * shape[1]:
            raise TableError(f"{file} changed its length while it was read")
        return cls(path, manifest, checksums.reshape(shape))

    def locate(self, token: int) -> tuple[int, int]:
        """Index of the token's shard, and the byte offset of its record in that file."""
        index = bisect_right(self._first_tokens, token) - 1
        shard = self.manifest.shards[index]
        return index, shard.data_start + (token - shard.first_token) * self.manifest.record_stride

    def check(self, token: int, payload: Bytes, groups: range | None = None) -> None:
        """Compare a payload uint8 [bytes of `groups`, or the whole record's] with the token's checksums.

        `groups` are consecutive. Raises RecordError.
        """
        groups = range(len(self.manifest.groups)) if groups is None else groups
        base = self.manifest.groups[groups.start].offset
        for index in groups:
            group = self.manifest.groups[index]
            found = crc32(payload[group.offset - base : group.offset - base + group.bytes].data, token)
            if found != self.checksums[token, index]:
                raise RecordError(token, "checksum", f"its checksum does not match (layers {group.layers})")

    def read_factors(self) -> dict[int, Bits]:
        """A lowrank table's factors by layer, uint16 [rank, hidden_size], the bits of bf16; none for other tables.

        Raises TableError when they cannot be read or are damaged.
        """
        if self.manifest.encoding.ranks is None:
            return {}
        factors = read_factors(self.path, self.manifest)
        parts = np.split(factors.values, np.cumsum(factors.ranks)[:-1])
        return dict(zip(self.manifest.layers, parts, strict=True))

    def read_record(self, token: int) -> Bytes:
        """One record uint8 [record_bytes], verified: a plain read for tools. Raises RecordError, or IndexError for a
        token that is not in the vocabulary."""
        if not 0 <= token < self.manifest.vocab_size:
            raise IndexError(f"token {token} is outside the table's {self.manifest.vocab_size} tokens")
        try:
            with (self.path / self.manifest.shards[self.locate(token)[0]].file).open("rb", buffering=0) as file:
                return self.read_from(file, token)
        except OSError as error:
            raise RecordError(token, "io", str(error)) from error

    def read_from(self, file: BinaryIO, token: int) -> Bytes:
        """`read_record` from the open file of the token's shard."""
        try:
            data = os.pread(file.fileno(), self.manifest.record_bytes, self.locate(token)[1])
        except OSError as error:
            raise RecordError(token, "io", str(error)) from error
        if len(data) < self.manifest.record_bytes:
            raise RecordError(token, "short", f"{len(data)} of {self.manifest.record_bytes} bytes are in the file")
        payload = np.frombuffer(data, np.uint8)
        self.check(token, payload)
        return payload


def verify(table: Table, progress: Callable[[int, int], object] | None = None) -> None:
    """Read every record, and the factors of a lowrank table, and check their checksums. `progress(done, total)` is
    called after each record.

    Raises TableError that counts the bad records and names the first ones.
    """
    if table.manifest.encoding.ranks is not None:
        table.read_factors()
    bad: list[RecordError] = []
    for shard in table.manifest.shards:
        with (table.path / shard.file).open("rb", buffering=0) as file:
            for token in range(shard.first_token, shard.first_token + shard.tokens):
                try:
                    table.read_from(file, token)
                except RecordError as error:
                    bad.append(error)
                if progress is not None:
                    progress(token + 1, table.manifest.vocab_size)
    if bad:
        named = "; ".join(str(error) for error in bad[:_NAMED])
        raise TableError(f"{len(bad)} of {table.manifest.vocab_size} records are bad: {named}")


def describe(table: Table) -> dict[str, Any]:
    """What `table inspect` shows; sizes in bytes. `read_bytes` is what a read moves, whole pages, as a mean."""
    manifest = table.manifest
    records = manifest.vocab_size
    return {
        "path": str(table.path),
        "format_version": FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "encoding": manifest.encoding.to_json(),
        "layout": LAYOUT,
        "vocab_size": records,
        "num_layers": manifest.num_layers,
        "dropped_layers": list(manifest.dropped_layers),
        "hidden_size": manifest.hidden_size,
        "groups": [
            {
                "layers": list(group.layers),
                "bytes": group.bytes,
                "read_bytes": manifest.read_bytes(range(index, index + 1)),
            }
            for index, group in enumerate(manifest.groups)
        ],
        "record_bytes": manifest.record_bytes,
        "record_stride": manifest.record_stride,
        "read_bytes": manifest.read_bytes(range(len(manifest.groups))),
        "payload_bytes": records * manifest.record_bytes,
        "stored_bytes": records * manifest.record_stride,
        "file_bytes": sum((table.path / name).stat().st_size for name in files_of(manifest)),
        "shards": [{"file": shard.file, "tokens": shard.tokens} for shard in manifest.shards],
        "frequencies": None,
    }


def files_of(manifest: Manifest) -> list[str]:
    """Names of all files of a table."""
    factors = [FACTORS] if manifest.encoding.ranks is not None else []
    return [MANIFEST, CHECKSUMS, *factors, *(shard.file for shard in manifest.shards)]
