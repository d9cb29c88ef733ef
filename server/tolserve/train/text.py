"""A run's tokenizer, and its training and held-out text as tokens."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tolserve.model.config import ModelConfig
from tolserve.tol.files import replacing
from tolserve.train.data import TOKENS, DataError, Tokens, read_documents, read_tokens, tokenise
from tolserve.train.evaluate import HeldOut
from tolserve.train.recipe import Recipe, TrainError
from tolserve.train.start import load_tokenizer
from tolserve.train.tokenizer import end_of_text, read_tokenizer, train_tokenizer, write_tokenizer


@dataclass(frozen=True)
class Text:
    """`separator` is the token in front of every document."""

    tokenizer: Tokenizer
    separator: int
    vocab_size: int
    recipe: Recipe

    @classmethod
    def prepare(cls, out: Path, shape: ModelConfig, recipe: Recipe) -> "Text":
        """The checkpoint's tokenizer (`init_from`), the one given, or one trained on the text and kept in `out`.

        Raises TrainError for a tokenizer that does not fit.
        """
        if recipe.init_from is not None:
            if recipe.tokenizer is not None:
                raise TrainError("--tokenizer: --init-from brings its own; its embedding is of that one's tokens")
            return cls(*load_tokenizer(Path(recipe.init_from), shape), shape.vocab_size, recipe)
        path = Path(recipe.tokenizer) if recipe.tokenizer is not None else out / "tokenizer.json"
        if recipe.tokenizer is not None:
            if not path.exists():
                raise TrainError(f"--tokenizer {path} does not exist")
            tokenizer = read_tokenizer(path)
            if (size := tokenizer.get_vocab_size()) != shape.vocab_size:
                raise TrainError(f"--vocab-size is {shape.vocab_size}, but the tokenizer {path} has {size} tokens")
        else:
            tokenizer = _own_tokenizer(path, shape, recipe)
        return cls(tokenizer, end_of_text(tokenizer, path), tokenizer.get_vocab_size(), recipe)

    def streams(self, kept: Path) -> tuple[Tokens, ...]:
        """Token streams of the training files; text is tokenised once and kept in the folder `kept`."""
        streams = []
        for index, data in enumerate(self.recipe.data):
            path = Path(data)
            if path.suffix != TOKENS:
                path = kept / f"tokens-{index}{TOKENS}"
                if not path.exists():
                    kept.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as file:
                        np.save(file, tokenise(Path(data), self.tokenizer, self.separator))
            streams.append(read_tokens(path, self.vocab_size))
        return tuple(streams)

    def held_out(self) -> HeldOut | None:
        """The held-out text, document by document. Raises DataError for a token file, since bits per byte need the
        bytes, and for a text in which nothing can be predicted."""
        if self.recipe.held_out is None:
            return None
        path = Path(self.recipe.held_out)
        if path.suffix == TOKENS:
            raise DataError(f"--held-out {path}: give text; a loss in bits per byte needs its bytes")
        texts = list(read_documents(path))
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        documents = tuple(np.array([self.separator, *e.ids], dtype=np.int32) for e in encoded)
        if not any(len(document) > 1 for document in documents):
            raise DataError(f"--held-out {path}: there is no text in it")
        return HeldOut(documents, sum(len(text.encode()) for text in texts))


def _own_tokenizer(path: Path, shape: ModelConfig, recipe: Recipe) -> Tokenizer:
    if path.exists():
        return read_tokenizer(path)
    if tokens := [data for data in recipe.data if Path(data).suffix == TOKENS]:
        raise TrainError(f"--data {tokens[0]} holds token ids; give --tokenizer, the one they are of")
    texts = (text for data in recipe.data for text in read_documents(Path(data)))
    tokenizer = train_tokenizer(texts, shape.vocab_size)
    write_tokenizer(tokenizer, path)
    return tokenizer
