"""Packs of random rows for tiny models, and what they do to a row, one pair of numbers at a time."""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tolserve.model.checkpoint import read_fingerprint
from tolserve.model.config import ModelConfig
from tolserve.model.pack import Target, make_entries, write_pack

Change = tuple[float, Tensor]  # what a row is multiplied by, and what is added [d]
Changes = dict[tuple[int, int], Change]  # by (token, layer)


def target_of(model_dir: Path) -> Target:
    config = ModelConfig.load(model_dir)
    return Target(read_fingerprint(model_dir), config.vocab_size, config.num_hidden_layers, config.hidden_size)


def save_pack(path: Path, model_dir: Path, changes: Changes, description: str = "for a test") -> None:
    """Entries in no order."""
    target = target_of(model_dir)
    pairs = list(changes)
    random.Random(1).shuffle(pairs)
    rows = [changes[pair][1] for pair in pairs]
    entries = make_entries(
        torch.tensor([token for token, _ in pairs], dtype=torch.int32),
        torch.tensor([layer for _, layer in pairs], dtype=torch.int32),
        torch.tensor([changes[pair][0] for pair in pairs]),
        torch.stack(rows) if rows else torch.zeros((0, target.hidden_size)),
        target,
    )
    write_pack(path, entries, target, description)


def random_changes(model_dir: Path, seed: int, tokens: Iterable[int], size: float = 2.0) -> Changes:
    """Of each token at about half of the layers; some rows are multiplied, some replaced, some added to."""
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    target = target_of(model_dir)
    changes: Changes = {}
    for token in tokens:
        for layer in range(target.num_layers):
            row = size * torch.randn(target.hidden_size, generator=generator)
            kind = dice.choice(["none", "none", "scale", "replace", "add"])
            if kind != "none":
                scale = {"scale": dice.uniform(-2, 2), "replace": 0.0, "add": 1.0}[kind]
                changes[token, layer] = scale, torch.zeros_like(row) if kind == "scale" else row
    return changes


def apply(
    row: Tensor, token: int, layer: int, alpha: float, packs: Iterable[Mapping[tuple[int, int], Change]]
) -> Tensor:
    """What a layer adds for a token: the packs' changes to its row, in order, and then alpha."""
    for changes in packs:
        scale, added = changes.get((token, layer), (1.0, torch.zeros_like(row)))
        row = scale * row + added
    return alpha * row
