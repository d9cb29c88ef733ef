"""A whole model directory of random weights, table and tokenizer, for benchmarks that start the real server.

    python benchmarks/model_dir.py /fast/disk/model-1b --size 1B

Weights are bf16 and tied, N(0, 0.02^2). Every token id has a text of its own, a short one, so that a stream has a chunk
for each token; the tokenizer merges nothing. `--table` links a table of random records that is there already.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import report
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tolserve.model.checkpoint import save_checkpoint
from tolserve.model.config import ModelConfig
from tolserve.model.presets import SIZES, preset
from tolserve.model.transformer import Transformer
from tolserve.study.random_table import random_table
from tolserve.tol.table import Table, describe

FINGERPRINT = "random"  # what tolserve.study.random_table stamps


def write_model(path: Path, config: ModelConfig, table: Path | None = None) -> Path:
    """The model directory at `path`, written now unless it is there; its table is `table`, or one of its own."""
    if (path / "tokenizer_config.json").exists():  # written last
        return path
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config, with_memory=False).named_parameters()}
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    save_checkpoint(path, config, tensors, FINGERPRINT)
    if config.has_memory and table is not None:
        (path / "tol").symlink_to(table.absolute())
    if config.has_memory:
        shape = {"vocab_size": config.vocab_size, "num_layers": config.num_hidden_layers}
        random_table(path / "tol", hidden_size=config.hidden_size, **shape)
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(_words(config.vocab_size))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


def _words(count: int) -> Iterator[str]:
    """All bytes as byte-level BPE writes them, then as many short words as are needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    yield from alphabet
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(count - len(alphabet)):
        word, rest = "", number
        for _ in range(4):
            rest, letter = divmod(rest, len(letters))
            word += letters[letter]
        yield "Ġ" + word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", default="1B", choices=SIZES)
    parser.add_argument("--variant", default="memory", choices=("base", "memory"))
    parser.add_argument("--layers", type=int, help="fewer than the size's, for a quick run")
    parser.add_argument("--vocab", type=int, help="fewer token ids than the size's")
    parser.add_argument("--table", type=Path, help="a table of random records of this shape, to be linked")
    args = parser.parse_args()
    config = preset(args.size, args.variant)
    config = replace(
        config,
        num_hidden_layers=args.layers or config.num_hidden_layers,
        vocab_size=args.vocab or config.vocab_size,
    )
    write_model(args.path, config, args.table)
    table = args.path / "tol"
    report.write({"model": args.path.name} | (describe(Table.open(table)) if table.exists() else {}), None)


if __name__ == "__main__":
    main()
