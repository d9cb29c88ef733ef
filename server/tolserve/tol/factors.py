"""The factors of a lowrank table: for each layer the directions [rank, hidden_size] that its rows are made of.

They lie beside the records as one bf16 tensor `factors`, one layer's directions after another.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tolserve.tol.manifest import FACTORS, Manifest, TableError, file_metadata, read_header

Bits = NDArray[np.uint16]


@dataclass(frozen=True)
class Factors:
    """`values` uint16 [sum of ranks, hidden_size], the bits of bf16; `made` says how they were chosen."""

    values: Bits
    ranks: tuple[int, ...]
    made: str

    @property
    def crc32(self) -> int:
        return zlib.crc32(self.values.data)

    def metadata(self, fingerprint: str) -> dict[str, str]:
        return file_metadata(fingerprint, 0) | {"made": self.made}


def check_factors(folder: Path, manifest: Manifest) -> tuple[int, dict[str, str]]:
    """Where the factors start in their file, and its metadata, from its header alone. Raises TableError."""
    shape = (sum(manifest.encoding.ranks or ()), manifest.hidden_size)
    data_start, metadata = read_header(folder / FACTORS, "factors", "BF16", shape)
    if metadata.get("fingerprint") != manifest.fingerprint:
        raise TableError(f"{folder / FACTORS} belongs to another table")
    return data_start, metadata


def read_factors(folder: Path, manifest: Manifest) -> Factors:
    """Read them and check their checksum. Raises TableError."""
    data_start, metadata = check_factors(folder, manifest)
    try:
        values = np.fromfile(folder / FACTORS, "<u2", offset=data_start).reshape(-1, manifest.hidden_size)
    except (OSError, ValueError) as error:
        raise TableError(f"{folder / FACTORS} cannot be read: {error}") from error
    factors = Factors(values, manifest.encoding.ranks or (), metadata.get("made", ""))
    if factors.crc32 != manifest.factors_crc32:
        raise TableError(f"{folder / FACTORS} is damaged: its checksum is not the manifest's")
    return factors
