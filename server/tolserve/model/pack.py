"""A pack's file: what some tokens get at some layers beside, or instead of, their rows in the table.

NAME.safetensors holds `tokens` and `layers` [E] int32, `scales` [E] float32 and `rows` [E, hidden_size] bfloat16 or
float32. Where entry e applies, a layer adds `scales[e] * row + rows[e]` instead of the table's row. The header's
metadata names the format, the fingerprint of the table that the pack is for, and what it is, in a sentence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tolserve.model.checkpoint import save_tensors

SUFFIX = ".safetensors"
FORMAT_VERSION = 1
MAX_DESCRIPTION = 500  # characters
# A header of four tensors and such a sentence, at up to twelve bytes of JSON a character, takes 7 KB.
MAX_HEADER = 16 * 1024
MAX_SCALE = 1000  # four packs at this and the largest alpha stay far inside float32
_NUMBERS = 12  # bytes of an entry's token, layer and scale
_DTYPES = {"tokens": ("I32",), "layers": ("I32",), "scales": ("F32",), "rows": ("BF16", "F32")}


class PackError(ValueError):
    """A pack that does not exist or cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Target:
    """The model whose table a pack is for."""

    fingerprint: str
    vocab_size: int
    num_layers: int
    hidden_size: int


@dataclass(frozen=True, eq=False)
class Entries:
    """What a pack changes, in order of tokens, then layers; no pair of them twice.

    tokens, layers int32 [E], scales float32 [E], rows bfloat16 or float32 [E, d].
    """

    tokens: NDArray[np.int32]
    layers: NDArray[np.int32]
    scales: NDArray[np.float32]
    rows: Tensor

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.layers.nbytes + self.scales.nbytes + self.rows.nbytes


@dataclass(frozen=True)
class Header:
    """What a pack's file says of itself before its data. `nbytes` are those of the data, `file_bytes` all."""

    entries: int
    hidden_size: int
    nbytes: int
    file_bytes: int
    fingerprint: str
    description: str


def read_header(start: bytes) -> Header:
    """The header at a file's start, of which MAX_HEADER bytes are enough. Raises PackError for one that no pack has."""
    size = int.from_bytes(start[:8], "little")
    if size > MAX_HEADER - 8:
        raise PackError("it is no pack: its header is too long")
    try:
        raw = json.loads(start[8 : 8 + size])
        metadata = raw.pop("__metadata__", {})
        version, fingerprint, description = (metadata[name] for name in ("tolserve_pack", "fingerprint", "description"))
        for text in (fingerprint, description):
            text.encode()  # what is no text cannot be told to anybody
        shapes = {name: tuple(raw[name]["shape"]) for name in raw}
        dtypes = {name: raw[name]["dtype"] for name in raw}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise PackError("it is no pack: its header lacks what `tolserve pack` writes") from None
    if version != str(FORMAT_VERSION):
        raise PackError(f"it has format version {version}; this tolserve reads {FORMAT_VERSION}")
    rows = shapes.get("rows", ())
    if len(rows) != 2 or not all(type(n) is int and 0 <= n < 1 << 31 for n in rows):
        raise PackError("it has no tensor rows [entries, hidden_size]")
    for name, known in _DTYPES.items():
        if shapes.get(name) != (rows if name == "rows" else rows[:1]) or dtypes[name] not in known:
            raise PackError(f"its tensor {name!r} must be {' or '.join(known)} of {rows[0]} entries")
    if len(raw) != len(_DTYPES):
        raise PackError("it holds other tensors than a pack has")
    nbytes = rows[0] * (_NUMBERS + rows[1] * (2 if dtypes["rows"] == "BF16" else 4))
    return Header(rows[0], rows[1], nbytes, 8 + size + nbytes, fingerprint, description[:MAX_DESCRIPTION])


def check_header(header: Header, target: Target, file_bytes: int) -> None:
    """Raises PackError for a pack of another model, and for a file of another size than the header says."""
    if header.file_bytes != file_bytes:
        raise PackError(f"its file has {file_bytes:,} bytes, and its header is one of {header.file_bytes:,}")
    if header.fingerprint != target.fingerprint:
        raise PackError(
            f"it was made for other weights (fingerprint {header.fingerprint[:64]}, this model's is "
            f"{target.fingerprint}); make it anew with `tolserve pack`"
        )
    if header.hidden_size != target.hidden_size:
        raise PackError(f"its rows have {header.hidden_size} values, the model's {target.hidden_size}")


def parse_pack(data: bytes, target: Target) -> Entries:
    """A pack's whole file, checked: shapes, dtypes, ids in range, every number finite, no entry twice.

    Raises PackError.
    """
    check_header(read_header(data[:MAX_HEADER]), target, len(data))
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise PackError(f"its file is damaged: {error}") from error
    return make_entries(tensors["tokens"], tensors["layers"], tensors["scales"], tensors["rows"], target)


def make_entries(tokens: Tensor, layers: Tensor, scales: Tensor, rows: Tensor, target: Target) -> Entries:
    """Entries in their order, of tensors in any. Raises PackError for numbers that cannot be."""
    for name, ids, end in (("token", tokens, target.vocab_size), ("layer", layers, target.num_layers)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < end:
            raise PackError(f"a {name} is not in 0..{end - 1}")
    if not scales.isfinite().all() or not rows.isfinite().all():
        raise PackError("a number in it is not finite")
    if scales.numel() and float(scales.abs().max()) > MAX_SCALE:
        raise PackError(f"a scale is not in {-MAX_SCALE}..{MAX_SCALE}")
    pairs = tokens.long() * target.num_layers + layers
    pairs, order = pairs.sort()
    if (pairs[1:] == pairs[:-1]).any():
        raise PackError("it has an entry twice: a token and layer may come once")
    if not torch.equal(order, torch.arange(len(order))):
        tokens, layers, scales, rows = tokens[order], layers[order], scales[order], rows[order]
    return Entries(tokens.numpy(), layers.numpy(), scales.numpy(), rows)


def check_path(path: Path) -> None:
    """Raises PackError for a file that no request could ask for."""
    if path.suffix != SUFFIX or not is_pack_name(path.stem):
        raise PackError(f"{path}: a pack's file is called NAME{SUFFIX}, NAME of letters, digits and ._- alone")


def write_pack(path: Path, entries: Entries, target: Target, description: str) -> None:
    """Write a pack, whole or not at all. Raises PackError for a name or a sentence that no pack may have, OSError."""
    check_path(path)
    if len(description) > MAX_DESCRIPTION:
        raise PackError(f"the description has {len(description)} characters; {MAX_DESCRIPTION} are allowed")
    tensors = {name: torch.from_numpy(getattr(entries, name)) for name in ("tokens", "layers", "scales")}
    metadata: dict[str, Any] = {"tolserve_pack": str(FORMAT_VERSION), "fingerprint": target.fingerprint}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors | {"rows": entries.rows}, metadata | {"description": description})


def is_pack_name(name: str) -> bool:
    """Whether a pack may be called so: nothing that leads out of a folder, or is long."""
    allowed = all(character.isascii() and (character.isalnum() or character in "._-") for character in name)
    return 0 < len(name) <= 100 and allowed
