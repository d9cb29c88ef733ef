"""The table file: written once, opened in milliseconds, read record by record.

Layout: token-major shards of one `U8` tensor `records [tokens, record_stride]` each; a record holds its layers' rows
one after another, encoded as tol/encoding.py says. The checksum of (record, group) is the CRC-32 of the group's bytes
started from the token id, so that a record in the wrong place is caught too.
"""

import os
import re
import secrets
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from tolserve.tol.encoding import BF16, Encoding, EncodingError
from tolserve.tol.manifest import (
    CHECKSUMS,
    FORMAT_VERSION,
    LAYOUT,
    MANIFEST,
    Group,
    Manifest,
    Shard,
    TableError,
    read_header,
    record_stride,
    write_header,
)

__all__ = ["ErrorKind", "Manifest", "RecordError", "Table", "TableError", "TableWriter", "describe", "verify"]

Bytes = NDArray[np.uint8]
ErrorKind = Literal["io", "short", "checksum"]
ERROR_KINDS: tuple[ErrorKind, ...] = ("io", "short", "checksum")

# Shards keep a file manageable for copying and for file systems with a size limit; reads do not care.
SHARD_BYTES = 4 << 30
# `verify` names this many bad tokens; the count says the rest.
_NAMED = 8
_TABLE_FILE = re.compile(r"manifest\.json|checksums\.safetensors|records-\d{5}-of-\d{5}\.safetensors")


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
            if data_start != shard.data_start or metadata != _shard_metadata(manifest.fingerprint, shard.first_token):
                raise TableError(f"{path / shard.file} is a shard of another table")
        shape = (manifest.vocab_size, len(manifest.groups))
        file = path / CHECKSUMS
        data_start, metadata = read_header(file, "checksums", "U32", shape)
        if metadata != _shard_metadata(manifest.fingerprint, 0):
            raise TableError(f"{file} belongs to another table")
        try:
            checksums = np.fromfile(file, dtype="<u4", offset=data_start)
        except OSError as error:
            raise TableError(f"{file} cannot be read: {error}") from error
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
            found = zlib.crc32(payload[group.offset - base : group.offset - base + group.bytes].data, token)
            if found != self.checksums[token, index]:
                raise RecordError(token, "checksum", f"its checksum does not match (layers {group.layers})")

    def read_record(self, token: int) -> Bytes:
        """One record uint8 [record_bytes], verified: a plain read for tools. Raises RecordError, or IndexError for a
        token that is not in the vocabulary."""
        if not 0 <= token < self.manifest.vocab_size:
            raise IndexError(f"token {token} is outside the table's {self.manifest.vocab_size} tokens")
        try:
            with (self.path / self.manifest.shards[self.locate(token)[0]].file).open("rb", buffering=0) as file:
                return self._read(file, token)
        except OSError as error:
            raise RecordError(token, "io", str(error)) from error

    def _read(self, file: BinaryIO, token: int) -> Bytes:
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
    """Read every record and check its checksums. `progress(done, total)` is called after each record.

    Raises TableError that counts the bad records and names the first ones.
    """
    bad: list[RecordError] = []
    for shard in table.manifest.shards:
        with (table.path / shard.file).open("rb", buffering=0) as file:
            for token in range(shard.first_token, shard.first_token + shard.tokens):
                try:
                    table._read(file, token)
                except RecordError as error:
                    bad.append(error)
                if progress is not None:
                    progress(token + 1, table.manifest.vocab_size)
    if bad:
        named = "; ".join(str(error) for error in bad[:_NAMED])
        raise TableError(f"{len(bad)} of {table.manifest.vocab_size} records are bad: {named}")


def describe(table: Table) -> dict[str, Any]:
    """What `table inspect` shows; sizes in bytes."""
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
        "groups": len(manifest.groups),
        "record_bytes": manifest.record_bytes,
        "record_stride": manifest.record_stride,
        "payload_bytes": records * manifest.record_bytes,
        "stored_bytes": records * manifest.record_stride,
        "file_bytes": sum((table.path / name).stat().st_size for name in _files(manifest)),
        "shards": [{"file": shard.file, "tokens": shard.tokens} for shard in manifest.shards],
        "frequencies": None,
    }


def _files(manifest: Manifest) -> list[str]:
    return [MANIFEST, CHECKSUMS, *(shard.file for shard in manifest.shards)]


def _shard_metadata(fingerprint: str, first_token: int) -> dict[str, str]:
    return {"fingerprint": fingerprint, "first_token": str(first_token)}


class TableWriter:
    """Writes a table's records in token order into a temporary sibling of `path`, which becomes `path` in `finish`.

    Until then nothing at `path` changes, so a valid table is replaced by a complete one only. After an error,
    `abort`. Raises TableError for a shape that no table can have, and for a `path` that holds anything but a table.
    """

    def __init__(
        self,
        path: Path,
        *,
        vocab_size: int,
        num_layers: int,
        hidden_size: int,
        fingerprint: str,
        encoding: Encoding = BF16,
        dropped_layers: tuple[int, ...] = (),
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        layers = tuple(layer for layer in range(num_layers) if layer not in dropped_layers)
        possible = min(len(layers), vocab_size, hidden_size) > 0 and len(layers) + len(dropped_layers) == num_layers
        if not possible or not fingerprint:
            raise TableError(
                f"no table has {vocab_size} tokens, {num_layers} layers of {hidden_size} without {dropped_layers}, "
                f"fingerprint {fingerprint!r}"
            )
        try:
            record_bytes = sum(map(encoding.row_bytes, encoding.widths(len(layers), hidden_size)))
        except EncodingError as error:
            raise TableError(str(error)) from None
        self._path = path = path.resolve()
        _refuse_to_replace_other_files(path)
        self._manifest = Manifest(
            fingerprint=fingerprint,
            vocab_size=vocab_size,
            num_layers=num_layers,
            hidden_size=hidden_size,
            layers=layers,
            dropped_layers=tuple(sorted(dropped_layers)),
            encoding=encoding,
            record_bytes=record_bytes,
            record_stride=record_stride(record_bytes),
            groups=(Group(layers, 0, record_bytes),),
            shards=(),
        )
        self._shard_tokens = max(1, shard_bytes // self._manifest.record_stride)
        self._shards: list[Shard] = []
        self._checksums = np.zeros((vocab_size, 1), "<u4")
        self._written = 0
        self._file: BinaryIO | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._folder.mkdir()

    @property
    def manifest(self) -> Manifest:
        """What the table will say of itself, but for its shards."""
        return self._manifest

    def write(self, records: Bytes) -> None:
        """Append records uint8 [n, record_bytes]. Raises TableError for another shape or more than vocab_size."""
        manifest = self._manifest
        if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != manifest.record_bytes:
            raise TableError(
                f"records are {records.dtype} {records.shape}; expected uint8 [n, {manifest.record_bytes}]"
            )
        if self._written + len(records) > manifest.vocab_size:
            raise TableError(f"more records than the {manifest.vocab_size} tokens of the vocabulary")
        while len(records):
            file = self._shard_file()
            shard = self._shards[-1]
            part = np.ascontiguousarray(records[: shard.first_token + shard.tokens - self._written])
            for token, record in enumerate(part, self._written):
                self._checksums[token, 0] = zlib.crc32(record.data, token)
            padding = manifest.record_stride - manifest.record_bytes
            file.write((np.pad(part, ((0, 0), (0, padding))) if padding else part).data)
            self._written += len(part)
            records = records[len(part) :]

    def _shard_file(self) -> BinaryIO:
        """The file that the next record goes to."""
        if self._file is not None and self._written < self._shards[-1].first_token + self._shards[-1].tokens:
            return self._file
        self._close_shard()
        vocab_size = self._manifest.vocab_size
        name = f"records-{len(self._shards) + 1:05d}-of-{-(-vocab_size // self._shard_tokens):05d}.safetensors"
        tokens = min(self._shard_tokens, vocab_size - self._written)
        self._file = (self._folder / name).open("xb")
        metadata = _shard_metadata(self._manifest.fingerprint, self._written)
        data_start = write_header(self._file, "records", "U8", (tokens, self._manifest.record_stride), metadata)
        self._shards.append(Shard(name, self._written, tokens, data_start))
        return self._file

    def _close_shard(self) -> None:
        if self._file is not None:
            _sync_and_close(self._file)
            self._file = None

    def finish(self) -> Manifest:
        """Write checksums and manifest, sync everything, and put the table in place.

        Raises TableError when records are missing; then `abort` is still due.
        """
        manifest = Manifest(**{**vars(self._manifest), "shards": tuple(self._shards)})
        if self._written != manifest.vocab_size:
            raise TableError(f"{self._written} of {manifest.vocab_size} records were written")
        self._close_shard()
        with (self._folder / CHECKSUMS).open("xb") as file:
            metadata = _shard_metadata(manifest.fingerprint, 0)
            write_header(file, "checksums", "U32", self._checksums.shape, metadata)
            file.write(self._checksums.data)
            _sync_and_close(file)
        with (self._folder / MANIFEST).open("xb") as file:
            file.write(manifest.to_json().encode())
            _sync_and_close(file)
        _sync_folder(self._folder)
        _replace_folder(self._folder, self._path)
        return manifest

    def abort(self) -> None:
        """Remove what was written. Does nothing after `finish`."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._folder, ignore_errors=True)


def _refuse_to_replace_other_files(path: Path) -> None:
    """Replacing a table deletes its folder: a path given by mistake must not cost somebody's files."""
    if path.is_dir():
        foreign = [file.name for file in path.iterdir() if not _TABLE_FILE.fullmatch(file.name)]
        if foreign:
            raise TableError(f"{path} is not replaced: it holds {foreign[0]!r}, which is no part of a table")
    elif path.exists():
        raise TableError(f"{path} is a file; a table is a folder")


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; what was at `path` is moved aside first, put back on failure, and deleted on success."""
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    replaced = path.exists()
    if replaced:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if replaced:
            os.rename(old, path)
        raise
    _sync_folder(path.parent)
    if replaced:
        shutil.rmtree(old, ignore_errors=True)
