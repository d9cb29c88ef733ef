"""Held-out loss, in bits per byte so that tokenizers can be compared."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tolserve.model.transformer import Transformer
from tolserve.train.data import DataError, Tokens


@dataclass(frozen=True)
class HeldOut:
    """Tokenised documents and the number of UTF-8 bytes they decode to; each document begins with the separator."""

    documents: tuple[Tokens, ...]
    text_bytes: int


@dataclass(frozen=True)
class Loss:
    nats_per_token: float
    bits_per_byte: float
    tokens: int


def windows(document: Tokens, length: int) -> Iterator[Tokens]:
    """Consecutive windows of at most length + 1 tokens that overlap by one, so that every token but the first is a
    target exactly once."""
    for start in range(0, len(document) - 1, length):
        yield document[start : start + length + 1]


def _batches(held_out: HeldOut, length: int, batch: int) -> Iterator[Tokens]:
    """Windows of equal length together, since a batch is a rectangle."""
    by_length: dict[int, list[Tokens]] = {}
    for document in held_out.documents:
        for window in windows(document, length):
            group = by_length.setdefault(len(window), [])
            group.append(window)
            if len(group) == batch:
                yield np.stack(by_length.pop(len(window)))
    for group in by_length.values():
        yield np.stack(group)


@torch.inference_mode()
def evaluate(model: Transformer, held_out: HeldOut, length: int, *, batch: int = 8, alpha: float = 1.0) -> Loss:
    """Mean loss over windows of `length` tokens; `alpha` scales every row (0 shows what the memory contributes).

    Raises DataError when there is nothing to predict.
    """
    device = model.model.embed_tokens.weight.device
    nats, tokens = 0.0, 0
    for rows in _batches(held_out, length, batch):
        sample = torch.from_numpy(rows).to(device).long()
        inputs, targets = sample[:, :-1], sample[:, 1:]
        logits = model(inputs, alpha).float()
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += targets.numel()
    if not tokens:
        raise DataError("the held-out text is empty")
    return Loss(nats / tokens, nats / math.log(2) / held_out.text_bytes, tokens)
