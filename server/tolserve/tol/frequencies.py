"""A list of how often each token occurs: a small .npz with `counts`, int64 [vocab_size]."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from tolserve.tol.files import replacing

Counts = npt.NDArray[np.int64]


class FrequencyError(ValueError):
    """A frequency list that cannot be used; the message names the file."""


def write_frequencies(path: Path, counts: Counts, mode: int = 0o666) -> None:
    """Raises OSError; the file is the old one or the new one, never half of one."""
    with replacing(path, mode) as file:
        np.savez_compressed(file, counts=counts)


def read_frequencies(path: Path, vocab_size: int) -> Counts:
    """Raises FrequencyError for a file that is none, and for a list of another vocabulary."""
    try:
        with np.load(path, allow_pickle=False) as file:
            counts = file["counts"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise FrequencyError(f"{path} is no frequency list (`tolserve table freq` writes one): {error}") from error
    if counts.dtype.kind not in "iu" or counts.ndim != 1 or (counts < 0).any():
        raise FrequencyError(f"{path}: counts must be one non-negative integer per token id")
    if len(counts) != vocab_size:
        raise FrequencyError(f"{path} counts a vocabulary of {len(counts)} tokens; this one has {vocab_size}")
    return counts.astype(np.int64)


def most_frequent(counts: Counts) -> list[int]:
    """The tokens that occur, the most frequent first; of equals the lowest id."""
    order = np.argsort(-counts, kind="stable")
    return [int(token) for token in order[: np.count_nonzero(counts)]]
