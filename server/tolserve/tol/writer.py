"""Writing a table: in a folder of its own beside the place where it will be, kept over interruptions.

The partial folder holds the table's files as they will be, but for the manifest's name. Every byte of them follows from
the records and the manifest, so a build that goes on where another stopped ends with the same files.
"""

import fcntl
import os
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tolserve.tol.encoding import BF16, Encoding, EncodingError
from tolserve.tol.factors import Factors, read_factors
from tolserve.tol.files import sync_folder
from tolserve.tol.manifest import (
    CHECKSUMS,
    FACTORS,
    MANIFEST,
    Group,
    Manifest,
    Shard,
    TableError,
    file_metadata,
    header,
    record_stride,
    split_layers,
)
from tolserve.tol.table import Bytes, RecordError, Table

# Shards keep a file manageable for copying and for file systems with a size limit; reads do not care.
SHARD_BYTES = 4 << 30
# What a crash of the machine may cost, at most; an end of the process alone costs nothing. A quarter of a second's
# writing on the disks this was made for, and many seconds' computing.
SYNC_BYTES = 256 << 20
COMING = "manifest.coming.json"  # the manifest until the table is complete
_TABLE_FILE = re.compile(
    r"manifest\.json|checksums\.safetensors|factors\.safetensors|records-\d{5}-of-\d{5}\.safetensors"
)


class PartialFolder:
    """`.NAME.partial` beside a table NAME: one writer at a time, and left behind when the writer is interrupted.

    Raises TableError when another process or object is writing there, and when it or `target` holds foreign files.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.resolve()
        _refuse_to_replace_other_files(self.target)
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self.path.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it ends
            if os.stat(self.path).st_ino != os.fstat(self._fd).st_ino:
                raise BlockingIOError  # its writer finished just now
            _refuse_to_replace_other_files(self.path)
        except BaseException as error:
            os.close(self._fd)  # and leave the folder alone: it is its writer's
            if isinstance(error, BlockingIOError | FileNotFoundError):
                raise TableError(f"another build is writing {self.target}; wait for it, or end it") from None
            raise

    def kept_factors(self, fingerprint: str, made: str) -> Factors | None:
        """The factors that an interrupted writer left here, if they are of this model and were made this way."""
        try:
            manifest = Manifest.load(self.path, COMING)
            factors = read_factors(self.path, manifest) if manifest.encoding.ranks is not None else None
        except TableError:
            return None
        wanted = factors is not None and manifest.fingerprint == fingerprint and factors.made == made
        return factors if wanted else None

    def close(self) -> None:
        """Let go of the folder and leave it as it is, unless it is empty. A second time does nothing."""
        if self._fd >= 0:
            with suppress(OSError):
                self.path.rmdir()
            os.close(self._fd)
            self._fd = -1

    def clear(self) -> None:
        for file in self.path.iterdir():
            file.unlink()

    def remove(self) -> None:
        """Delete it. Does nothing after `close` or `put_in_place`."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self.close()

    def put_in_place(self) -> None:
        """Rename it to `target`; what was there is moved aside first, put back on failure, and deleted on success."""
        os.fsync(self._fd)
        old = self.target.with_name(f".{self.target.name}.old")
        if replaced := self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.target, old)
        try:
            os.rename(self.path, self.target)
        except OSError:
            if replaced:
                os.rename(old, self.target)
            raise
        sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)
        self.close()


class TableWriter:
    """Writes a table's records in token order into a partial folder, which becomes the table in `finish`.

    Until then nothing at the table's place changes, so a valid table is replaced by a complete one only. After an
    error, `abort` deletes what was written and `close` leaves it for another writer with the same `partial` place.
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
        factors: Factors | None = None,
        shard_bytes: int = SHARD_BYTES,
        partial: PartialFolder | None = None,
        batch: int = 1,
    ) -> None:
        """`factors` are a lowrank table's, uint16 [sum of ranks, hidden_size], the bits of bf16.

        Without `partial` it starts over. With it, `written` records are there already: those of an interrupted writer
        of the same manifest whose checksums are right, in whole batches of `batch` records.
        Raises TableError for a shape that no table can have, and as PartialFolder does.
        """
        self.manifest = lay_out(
            vocab_size=vocab_size,
            num_layers=num_layers,
            hidden_size=hidden_size,
            fingerprint=fingerprint,
            encoding=encoding,
            dropped_layers=dropped_layers,
            shard_bytes=shard_bytes,
            factors=factors,
        )
        self.written = 0
        self._unsynced = 0
        self._file: BinaryIO | None = None
        self._checksums = np.zeros((vocab_size, len(self.manifest.groups)), "<u4")
        self._partial = partial if partial is not None else PartialFolder(path)
        try:
            if partial is not None and self._is_continued():
                self._keep(batch)
            else:
                self._start_over(factors)
        except BaseException:
            self.close()
            raise

    def _is_continued(self) -> bool:
        folder = self._partial.path
        with suppress(FileNotFoundError):
            os.rename(folder / MANIFEST, folder / COMING)  # it was complete, but not in place yet
        try:
            size = len(self._checksum_header()) + self._checksums.nbytes
            whole = (folder / CHECKSUMS).stat().st_size == size
            return whole and (folder / COMING).read_bytes() == self.manifest.to_json().encode()
        except FileNotFoundError:
            return False

    def _checksum_header(self) -> bytes:
        return header("checksums", "U32", self._checksums.shape, file_metadata(self.manifest.fingerprint, 0))

    def _start_over(self, factors: Factors | None) -> None:
        self._partial.clear()
        folder = self._partial.path
        if factors is not None:
            start = header("factors", "BF16", factors.values.shape, factors.metadata(self.manifest.fingerprint))
            _write_synced(folder / FACTORS, start + factors.values.tobytes())
        _write_synced(folder / CHECKSUMS, self._checksum_header() + self._checksums.tobytes())
        _write_synced(folder / COMING, self.manifest.to_json().encode())
        sync_folder(folder)

    def _keep(self, batch: int) -> None:
        """Find how many records are right, from the first on."""
        file = self._partial.path / CHECKSUMS
        stored = np.fromfile(file, "<u4", offset=len(self._checksum_header()))
        if stored.size != self._checksums.size:
            raise TableError(f"{file} changed its length while it was read")
        self._checksums[:] = stored.reshape(self._checksums.shape)
        table = Table(self._partial.path, self.manifest, self._checksums)
        right = 0
        with suppress(RecordError, FileNotFoundError):
            for shard in self.manifest.shards:
                with (table.path / shard.file).open("rb", buffering=0) as records:
                    for token in range(shard.first_token, shard.first_token + shard.tokens):
                        table.read_from(records, token)
                        right += 1
        self.written = right if right == self.manifest.vocab_size else right // batch * batch

    def write(self, records: Bytes) -> None:
        """Append records uint8 [n, record_bytes]. Raises TableError for another shape or more than vocab_size, OSError
        when the disk does not take them."""
        manifest = self.manifest
        if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != manifest.record_bytes:
            raise TableError(
                f"records are {records.dtype} {records.shape}; expected uint8 [n, {manifest.record_bytes}]"
            )
        if self.written + len(records) > manifest.vocab_size:
            raise TableError(f"more records than the {manifest.vocab_size} tokens of the vocabulary")
        padding = manifest.record_stride - manifest.record_bytes
        while len(records):
            shard, file = self._shard_file()
            part = np.ascontiguousarray(records[: shard.first_token + shard.tokens - self.written])
            file.write((np.pad(part, ((0, 0), (0, padding))) if padding else part).data)
            self._sum(part)
            self._unsynced += len(part) * manifest.record_stride
            if self._unsynced >= SYNC_BYTES:
                self._sync()
            records = records[len(part) :]

    def _sum(self, part: Bytes) -> None:
        """Note the checksums of the records written last, here and behind them on disk."""
        end = self.written + len(part)
        for token, record in enumerate(part, self.written):
            for index, group in enumerate(self.manifest.groups):
                payload = record[group.offset : group.offset + group.bytes]
                self._checksums[token, index] = zlib.crc32(payload.data, token)
        with (self._partial.path / CHECKSUMS).open("r+b") as file:
            file.seek(len(self._checksum_header()) + self.written * self._checksums.strides[0])
            file.write(self._checksums[self.written : end].data)
        self.written = end

    def _shard_file(self) -> tuple[Shard, BinaryIO]:
        """Where the next record goes, and the open file, at that place."""
        shards = self.manifest.shards
        shard = next(shard for shard in reversed(shards) if shard.first_token <= self.written)
        if self._file is None or self.written == shard.first_token:
            self._sync()
            self._close_file()
            path = self._partial.path / shard.file
            path.touch()
            self._file = path.open("r+b")
            self._file.write(_shard_header(self.manifest, shard))
            self._file.truncate(shard.data_start + (self.written - shard.first_token) * self.manifest.record_stride)
            self._file.seek(0, os.SEEK_END)
        return shard, self._file

    def _sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def _close_file(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def finish(self) -> Manifest:
        """Sync everything and put the table in place. Raises TableError when records are missing; then `abort` or
        `close` is still due."""
        if self.written != self.manifest.vocab_size:
            raise TableError(f"{self.written} of {self.manifest.vocab_size} records were written")
        self._close_file()
        folder = self._partial.path
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        os.rename(folder / COMING, folder / MANIFEST)
        self._partial.put_in_place()
        return self.manifest

    def close(self) -> None:
        """Stop, and leave what was written for a writer that goes on. Does nothing after `finish`."""
        with suppress(OSError):  # the disk's refusal was told when it came first
            self._close_file()
        self._partial.close()

    def abort(self) -> None:
        """Stop, and remove what was written. Does nothing after `finish`."""
        with suppress(OSError):
            self._close_file()
        self._partial.remove()


def lay_out(
    *,
    vocab_size: int,
    num_layers: int,
    hidden_size: int,
    fingerprint: str,
    encoding: Encoding = BF16,
    dropped_layers: tuple[int, ...] = (),
    shard_bytes: int = SHARD_BYTES,
    factors: Factors | None = None,
) -> Manifest:
    """The manifest of a table before there is one. Raises TableError for a shape that no table can have."""
    layers = tuple(layer for layer in range(num_layers) if layer not in dropped_layers)
    possible = min(len(layers), vocab_size, hidden_size) > 0 and len(layers) + len(dropped_layers) == num_layers
    if not possible or not fingerprint:
        raise TableError(
            f"no table has {vocab_size} tokens, {num_layers} layers of {hidden_size} without {dropped_layers}, "
            f"fingerprint {fingerprint!r}"
        )
    try:
        widths = encoding.widths(len(layers), hidden_size)
    except EncodingError as error:
        raise TableError(str(error)) from None
    if (factors is None) != (encoding.ranks is None) or (
        factors is not None and factors.values.shape != (sum(widths), hidden_size)
    ):
        raise TableError(f"a {encoding.name} table does not go with these factors")
    row_bytes = dict(zip(layers, map(encoding.row_bytes, widths), strict=True))
    groups: list[Group] = []
    for part in split_layers(layers):
        offset = groups[-1].offset + groups[-1].bytes if groups else 0
        groups.append(Group(part, offset, sum(row_bytes[layer] for layer in part)))
    record_bytes = sum(row_bytes.values())
    manifest = Manifest(
        fingerprint=fingerprint,
        vocab_size=vocab_size,
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=layers,
        dropped_layers=tuple(sorted(dropped_layers)),
        encoding=encoding,
        record_bytes=record_bytes,
        record_stride=record_stride(record_bytes),
        groups=tuple(groups),
        shards=(),
        factors_crc32=factors.crc32 if factors is not None else None,
    )
    return replace(manifest, shards=_shards(manifest, max(1, shard_bytes // manifest.record_stride)))


def _shards(manifest: Manifest, tokens_each: int) -> tuple[Shard, ...]:
    count = -(-manifest.vocab_size // tokens_each)
    shards = []
    for index in range(count):
        first = index * tokens_each
        tokens = min(tokens_each, manifest.vocab_size - first)
        shard = Shard(f"records-{index + 1:05d}-of-{count:05d}.safetensors", first, tokens, 0)
        shards.append(replace(shard, data_start=len(_shard_header(manifest, shard))))
    return tuple(shards)


def _shard_header(manifest: Manifest, shard: Shard) -> bytes:
    metadata = file_metadata(manifest.fingerprint, shard.first_token)
    return header("records", "U8", (shard.tokens, manifest.record_stride), metadata)


def _refuse_to_replace_other_files(path: Path) -> None:
    """Replacing a table deletes its folder: a path given by mistake must not cost somebody's files."""
    if path.is_dir():
        foreign = [f.name for f in path.iterdir() if not _TABLE_FILE.fullmatch(f.name) and f.name != COMING]
        if foreign:
            raise TableError(f"{path} is not replaced: it holds {foreign[0]!r}, which is no part of a table")
    elif path.exists():
        raise TableError(f"{path} is a file; a table is a folder")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
