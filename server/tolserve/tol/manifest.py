"""What a table's files say about themselves: the manifest, and the header of each safetensors file.

A table is `manifest.json`, `records-00001-of-0000N.safetensors` and `checksums.safetensors` in one folder. Everything
read here is checked before it is believed: a table comes from disk, and may come from a stranger.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tolserve.tol.encoding import Encoding, EncodingError, RowLayout

PAGE = 4096  # the unit of O_DIRECT: offsets, lengths and buffers are multiples of it
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUMS = "checksums.safetensors"
FACTORS = "factors.safetensors"
LAYOUT = "token-major"
ITEM_BYTES = {"U8": 1, "BF16": 2, "U32": 4}  # safetensors' names of the dtypes used here
_MAX_HEADER = 1 << 20  # ours are one page; a longer header is somebody else's file


class TableError(ValueError):
    """A folder that is no usable table, or records that cannot become one; the message names the file and the fault."""


@dataclass(frozen=True)
class Group:
    """A part of a record, consecutive bytes with one checksum: the rows of `layers` in order."""

    layers: tuple[int, ...]
    offset: int  # in the record
    bytes: int


@dataclass(frozen=True)
class Shard:
    """One file: tokens [first_token, first_token + tokens), their records from byte `data_start` on."""

    file: str
    first_token: int
    tokens: int
    data_start: int


@dataclass(frozen=True)
class Manifest:
    """A table's shape and whereabouts. `layers` are those with rows, in record order: all but `dropped_layers`.

    A record is `record_bytes` of payload, and records lie `record_stride` bytes apart in their shard.
    """

    fingerprint: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    layers: tuple[int, ...]
    dropped_layers: tuple[int, ...]
    encoding: Encoding
    record_bytes: int
    record_stride: int
    groups: tuple[Group, ...]
    shards: tuple[Shard, ...]
    factors_crc32: int | None = None  # of a lowrank table's factors, one layer's after another; None for others

    def row_layout(self, layer: int) -> tuple[int, RowLayout]:
        """Index of the layer's group, and where in that part of a record its row lies. Raises KeyError for a layer
        without rows."""
        return self._row_layouts[layer]

    @cached_property
    def _row_layouts(self) -> dict[int, tuple[int, RowLayout]]:
        encoding = self.encoding
        widths = dict(zip(self.layers, encoding.widths(len(self.layers), self.hidden_size), strict=True))
        layouts = {}
        for index, group in enumerate(self.groups):
            offset = 0
            for layer in group.layers:
                layouts[layer] = index, RowLayout(offset, widths[layer], encoding.values, encoding.group_size)
                offset += encoding.row_bytes(widths[layer])
        return layouts

    def read_bytes(self, groups: range) -> float:
        """Bytes that reading these consecutive groups of one record moves, whole pages, as a mean over all tokens."""
        first, last = self.groups[groups.start], self.groups[groups.stop - 1]
        moved = 0
        for shard in self.shards:
            starts = np.arange(shard.tokens, dtype=np.int64) * self.record_stride + first.offset
            ends = starts + last.offset + last.bytes - first.offset
            moved += int((-(-ends // PAGE) - starts // PAGE).sum()) * PAGE
        return moved / self.vocab_size

    def to_json(self) -> str:
        checksums = {"file": CHECKSUMS, "algorithm": "crc32", "seed": "token"}
        fixed = {
            "format_version": FORMAT_VERSION,
            "layout": LAYOUT,
            "checksums": checksums,
            "frequencies": None,
        }
        fields = fixed | asdict(self) | {"encoding": self.encoding.to_json()}
        crc32 = fields.pop("factors_crc32")
        if crc32 is not None:
            fields["factors"] = {"file": FACTORS, "crc32": crc32}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path, name: str = MANIFEST) -> "Manifest":
        """Read and check the manifest of the table in `path`. Raises TableError."""
        file = path / name
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise TableError(
                f"{path} is no table: it holds no {MANIFEST} (a build that was cut off leaves none)"
            ) from None
        except OSError as error:
            raise TableError(f"{file} cannot be read: {error}") from error
        except (ValueError, RecursionError) as error:
            raise TableError(f"{file} is not JSON: {error}") from error
        try:
            return _parse(raw)
        except TableError as error:
            raise TableError(f"{file}: {error}") from None


def split_layers(layers: Sequence[int]) -> list[tuple[int, ...]]:
    """Layers of each group of a new record. The first quarter is a group of its own where there are at least four.

    Its rows are needed first, so that a reader may keep them near for more tokens than the rest.
    """
    first = -(-len(layers) // 4) if len(layers) >= 4 else len(layers)
    return [tuple(part) for part in (layers[:first], layers[first:]) if part]


def record_stride(record_bytes: int) -> int:
    """Distance between records: whole pages where padding wastes under 10% of the file, else none is added."""
    padded = -(-record_bytes // PAGE) * PAGE
    return padded if (padded - record_bytes) * 10 < padded else record_bytes


def _fields(raw: Any, what: str, names: set[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise TableError(f"{what} is {type(raw).__name__}, not an object")
    if missing := sorted(names - raw.keys()):
        raise TableError(f"{what} lacks {', '.join(missing)}")
    if extra := sorted(raw.keys() - names):
        raise TableError(f"{what} has unknown {', '.join(map(repr, extra))}; a newer tolserve may have written it")
    return raw


def _number(raw: Any, what: str, least: int) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < least:
        raise TableError(f"{what} is {raw!r}; it must be a whole number of at least {least}")
    return raw


def _numbers(raw: Any, what: str) -> tuple[int, ...]:
    if not isinstance(raw, list):
        raise TableError(f"{what} is {raw!r}; it must be a list of whole numbers")
    return tuple(_number(value, what, 0) for value in raw)


def _objects(raw: Any, what: str, names: set[str]) -> list[dict[str, Any]]:
    if not isinstance(raw, list) or not raw:
        raise TableError(f"{what} must be a list with at least one entry")
    return [_fields(entry, f"an entry of {what}", names) for entry in raw]


def _group(raw: dict[str, Any]) -> Group:
    layers, offset = _numbers(raw["layers"], "layers of a group"), _number(raw["offset"], "offset of a group", 0)
    return Group(layers, offset, _number(raw["bytes"], "bytes of a group", 1))


def _shard(raw: dict[str, Any]) -> Shard:
    file = raw["file"]
    if not isinstance(file, str) or Path(file).name != file or "\0" in file or file in ("", ".", ".."):
        raise TableError(f"shard file {file!r} is no plain file name inside the table")
    first, tokens = _number(raw["first_token"], "first_token", 0), _number(raw["tokens"], "tokens of a shard", 1)
    return Shard(file, first, tokens, _number(raw["data_start"], "data_start", 0))


def _factors(raw: Any) -> int:
    fields = _fields(raw, "factors", {"file", "crc32"})
    if fields["file"] != FACTORS:
        raise TableError(f"the file of factors is {fields['file']!r}; this tolserve reads {FACTORS!r}")
    return _number(fields["crc32"], "crc32 of factors", 0)


def _parse(raw: Any) -> Manifest:
    if not isinstance(raw, dict):
        raise TableError("the manifest is no JSON object")
    if raw.get("format_version") != FORMAT_VERSION:
        version = raw.get("format_version")
        raise TableError(f"format_version is {version!r}; this tolserve reads {FORMAT_VERSION}: build the table again")
    fixed = {"format_version", "layout", "checksums", "frequencies"}
    try:
        encoding = Encoding.parse(raw.get("encoding"))
    except EncodingError as error:
        raise TableError(str(error)) from None
    lowrank = {"factors"} if encoding.ranks is not None else set()
    raw = _fields(raw, "the manifest", fixed | lowrank | set(Manifest.__dataclass_fields__) - {"factors_crc32"})
    checksums = {"file": CHECKSUMS, "algorithm": "crc32", "seed": "token"}
    for name, value in {"layout": LAYOUT, "checksums": checksums, "frequencies": None}.items():
        if raw[name] != value:
            raise TableError(f"{name} is {raw[name]!r}; this tolserve reads {value!r}")
    if not isinstance(raw["fingerprint"], str) or not raw["fingerprint"]:
        raise TableError("fingerprint is no text")
    manifest = Manifest(
        fingerprint=raw["fingerprint"],
        vocab_size=_number(raw["vocab_size"], "vocab_size", 1),
        num_layers=_number(raw["num_layers"], "num_layers", 1),
        hidden_size=_number(raw["hidden_size"], "hidden_size", 1),
        layers=_numbers(raw["layers"], "layers"),
        dropped_layers=_numbers(raw["dropped_layers"], "dropped_layers"),
        encoding=encoding,
        record_bytes=_number(raw["record_bytes"], "record_bytes", 1),
        record_stride=_number(raw["record_stride"], "record_stride", 1),
        groups=tuple(_group(g) for g in _objects(raw["groups"], "groups", {"layers", "offset", "bytes"})),
        shards=tuple(_shard(s) for s in _objects(raw["shards"], "shards", set(Shard.__dataclass_fields__))),
        factors_crc32=_factors(raw["factors"]) if lowrank else None,
    )
    _check_record(manifest)
    _check_extents(manifest)
    return manifest


def _check_record(manifest: Manifest) -> None:
    layers = sorted(manifest.layers + manifest.dropped_layers)
    if len(layers) != manifest.num_layers or layers != list(range(len(layers))):
        raise TableError(f"layers and dropped_layers do not make up the {manifest.num_layers} layers of the model")
    if tuple(layer for group in manifest.groups for layer in group.layers) != manifest.layers:
        raise TableError("the groups do not hold the layers in order")
    try:
        widths = manifest.encoding.widths(len(manifest.layers), manifest.hidden_size)
    except EncodingError as error:
        raise TableError(str(error)) from None
    row_bytes = dict(zip(manifest.layers, map(manifest.encoding.row_bytes, widths), strict=True))
    end = 0
    for group in manifest.groups:
        if group.offset != end or group.bytes != sum(row_bytes[layer] for layer in group.layers):
            raise TableError(f"group {group} does not start at byte {end} or has the wrong size")
        end += group.bytes
    if end != manifest.record_bytes or manifest.record_stride < end:
        raise TableError(f"groups of {end} bytes do not fit record_bytes and record_stride")


def _check_extents(manifest: Manifest) -> None:
    expected = 0
    for shard in manifest.shards:
        if shard.first_token != expected:
            raise TableError(
                f"shard {shard.file} starts at token {shard.first_token}, not {expected}: a gap or an overlap"
            )
        if shard.data_start % PAGE:
            raise TableError(f"shard {shard.file} has its data at byte {shard.data_start}, no multiple of {PAGE}")
        expected += shard.tokens
    if expected != manifest.vocab_size:
        raise TableError(f"the shards hold {expected} records; vocab_size is {manifest.vocab_size}")
    if len({shard.file for shard in manifest.shards}) != len(manifest.shards):
        raise TableError("two shards have the same file")


def header(name: str, dtype: str, shape: tuple[int, ...], metadata: dict[str, str]) -> bytes:
    """Header of a safetensors file with one tensor, padded so that the data behind it starts at a page."""
    size = prod(shape) * ITEM_BYTES[dtype]
    tensor = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, name: tensor}, separators=(",", ":")).encode()
    data_start = -(-(8 + len(text)) // PAGE) * PAGE
    return struct.pack("<Q", data_start - 8) + text.ljust(data_start - 8)


def file_metadata(fingerprint: str, first_token: int) -> dict[str, str]:
    """What a table's safetensors file says of where it belongs."""
    return {"fingerprint": fingerprint, "first_token": str(first_token)}


def read_header(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, dict[str, str]]:
    """Where the data of a safetensors file with exactly this tensor starts, and the file's metadata.

    Raises TableError for another tensor, a header that is none, or one that disagrees with the file's length.
    """
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            (header_bytes,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            text = file.read(header_bytes) if header_bytes <= min(_MAX_HEADER, length - 8) else b""
        header = json.loads(text)
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} has no safetensors header: {error}") from error
    if not isinstance(header, dict) or header.keys() != {"__metadata__", name} or not isinstance(header[name], dict):
        raise TableError(f"{path} does not hold the tensor {name!r} alone")
    size = prod(shape) * ITEM_BYTES[dtype]
    expected = {"dtype": dtype, "shape": list(shape), "data_offsets": [0, size]}
    if header[name] != expected:
        raise TableError(f"{path} holds {name!r} as {header[name]}; the manifest asks for {expected}")
    if length != 8 + header_bytes + size:
        raise TableError(f"{path} is {length} bytes long; its header describes {8 + header_bytes + size}")
    metadata = header["__metadata__"]
    return 8 + header_bytes, metadata if isinstance(metadata, dict) else {}
