"""Held-out loss, in bits per byte so that tokenizers can be compared."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.train.data import DataError, Tokens

# Logits of a batch, in values: 268 MB, and as much again for their softmax.
LOGITS = 1 << 26


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


def batch_values(config: ModelConfig) -> int:
    """Tokens in a batch whose logits are all held: 8,192 at a vocabulary of 8,192, 523 at 128,256."""
    return LOGITS // config.vocab_size


def rectangles(sequences: Iterable[Tokens], values: int) -> Iterator[tuple[list[int], Tensor]]:
    """Sequences of equal length together, since a batch is a rectangle: where they were in the order given, and int64
    [n, length] of at most `values` tokens (at least one sequence)."""
    by_length: dict[int, list[tuple[int, Tokens]]] = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append((index, sequence))
    for length, group in sorted(by_length.items()):
        size = max(1, values // length)
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield [index for index, _ in part], torch.from_numpy(np.stack([sequence for _, sequence in part])).long()


@torch.inference_mode()
def mean_loss(
    forward: Callable[[Tensor], Tensor], held_out: HeldOut, length: int, values: int, device: torch.device
) -> Loss:
    """Mean loss over windows of `length` tokens, in batches of at most `values` tokens.

    `forward` takes tokens [B, S] int64 on `device` to logits [B, S, V]. Raises DataError when there is nothing to
    predict.
    """
    nats, tokens = 0.0, 0
    cut = (window for document in held_out.documents for window in windows(document, length))
    for _, sample in rectangles(cut, values):
        inputs, targets = sample[:, :-1].to(device), sample[:, 1:].to(device)
        logits = forward(inputs).float()
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += targets.numel()
    if not tokens:
        raise DataError("the text is empty: there is no token to predict")
    return Loss(nats / tokens, nats / math.log(2) / held_out.text_bytes, tokens)


def evaluate(model: Transformer, held_out: HeldOut, length: int, *, alpha: float = 1.0) -> Loss:
    """Mean loss over windows of `length` tokens; `alpha` scales every row (0 shows what the memory contributes).

    Raises DataError when there is nothing to predict.
    """
    device = model.model.embed_tokens.weight.device
    return mean_loss(lambda tokens: model(tokens, alpha), held_out, length, batch_values(model.config), device)
