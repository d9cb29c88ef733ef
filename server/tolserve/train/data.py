"""Text to packed token sequences, in an order that a seed fixes."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.int32]  # of a token file, any integers


class DataError(ValueError):
    """Training text that cannot be read; the message names the file and line."""


# By the end of a file's name.
_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
TOKENS = ".npy"

# Characters that are tokenised at once: 0.2 GB of tokens with their names and places, and work for all cores.
GROUP = 1 << 20


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a file: each `text` of a .jsonl, or the whole of a .txt; either may end in .gz, .bz2 or .xz."""
    opener = _OPENERS.get(path.suffix, open)
    kind = path.with_suffix("").suffix if path.suffix in _OPENERS else path.suffix
    if kind not in (".jsonl", ".txt"):
        raise DataError(f"{path}: expected text, .jsonl or .txt, optionally with {', '.join(_OPENERS)}")
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if kind == ".txt":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                yield _text(path, number, line)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: not an object with a 'text': {error!r}") from error
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: 'text' is no string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is no character
        raise DataError(f"{path}:{number}: 'text' has a character that UTF-8 has not: {error}") from error
    return text


def tokenise(path: Path, tokenizer: Tokenizer, separator: int) -> Tokens:
    """All documents of a file as one stream, each begun by `separator`. All cores work, a document each.

    A document is tokenised in one piece, since a cut could change its tokens; that takes about 200 bytes a character.
    """
    parts: list[Tokens] = []
    for texts in _groups(read_documents(path)):
        for encoded in tokenizer.encode_batch(texts, add_special_tokens=False):
            parts.append(np.array([separator, *encoded.ids], dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents that are tokenised together: of GROUP characters, and the rest of the last one."""
    group: list[str] = []
    size = 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    yield group


def read_tokens(path: Path, vocab_size: int) -> Tokens:
    """A stream of token ids that was saved with numpy.save: one dimension of integers, documents separated inside.

    The file stays on disk and is read where a sequence is taken. Raises DataError for another array, or an id that the
    vocabulary does not have.
    """
    try:
        stream: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy: {error}") from error
    if stream.ndim != 1 or stream.dtype.kind not in "iu":
        raise DataError(f"{path} holds {stream.dtype} {list(stream.shape)}; token ids are integers in one dimension")
    if len(stream) and not 0 <= stream.min() <= stream.max() < vocab_size:
        raise DataError(f"{path} has ids from {stream.min()} to {stream.max()}; the vocabulary has {vocab_size} tokens")
    return stream


@dataclass(frozen=True)
class Sequences:
    """A training stream cut into `length + 1` tokens (inputs and shifted targets), files in the order given.

    Inside one file the sequences are shuffled by `seed`, so that files make a curriculum and a step mixes documents.
    Sequence i is the same in every run, which is what makes a resumed run exact.
    """

    streams: tuple[Tokens, ...]
    length: int
    seed: int

    def order(self) -> npt.NDArray[np.int64]:
        """[sequences, 2]: stream index and first token of each sequence, in training order."""
        generator = np.random.default_rng(self.seed)
        parts = []
        for index, stream in enumerate(self.streams):
            starts = np.arange(0, len(stream) - self.length, self.length)
            parts.append(np.stack([np.full_like(starts, index), generator.permutation(starts)], axis=1))
        return np.concatenate(parts)

    def batches(self, batch: int, first_step: int) -> Iterator[Tokens]:
        """[batch, length + 1] per step, from step `first_step` on; wraps round when the text is used up."""
        order = self.order()
        if not len(order):
            raise DataError(f"the training text is shorter than one sequence of {self.length} tokens")
        cursor = first_step * batch
        while True:
            chosen = order[np.arange(cursor, cursor + batch) % len(order)]
            cut = [self.streams[i][start : start + self.length + 1] for i, start in chosen]
            yield np.stack(cut).astype(np.int32, copy=False)
            cursor += batch
