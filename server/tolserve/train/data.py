"""Text to packed token sequences, in an order that a seed fixes."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.int32]


class DataError(ValueError):
    """Training text that cannot be read; the message names the file and line."""


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a file: each `text` of a .jsonl, or the whole of a .txt; either may end in .gz."""
    opener = gzip.open if path.suffix == ".gz" else open
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".txt"):
        raise DataError(f"{path}: expected .jsonl or .txt, optionally with .gz")
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if kind == ".txt":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                yield _text(path, number, line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}:{number}: not an object with a 'text': {error!r}") from error
    if not isinstance(text, str):
        raise DataError(f"{path}:{number}: 'text' is no string")
    return text


def tokenise(path: Path, tokenizer: Tokenizer, separator: int) -> Tokens:
    """All documents of a file as one stream, each begun by `separator`."""
    parts: list[Tokens] = []
    for text in read_documents(path):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        parts.append(np.array([separator, *ids], dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


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
            yield np.stack([self.streams[i][start : start + self.length + 1] for i, start in chosen])
            cursor += batch
