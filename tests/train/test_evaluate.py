"""Held-out loss against a slow reference that scores one token at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import Reference, weights_of
from tiny import random_model, tiny_config
from tolserve.train.data import DataError
from tolserve.train.evaluate import HeldOut, evaluate, mean_loss, windows

documents = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=14), min_size=1, max_size=5)


@given(size=st.integers(0, 50), length=st.integers(1, 20))
def test_windows_score_every_token_but_the_first_once(size: int, length: int) -> None:
    cut = list(windows(np.arange(size, dtype=np.int32), length))
    assert [t for window in cut for t in window[1:].tolist()] == list(range(1, size))
    assert all(2 <= len(window) <= length + 1 for window in cut)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
@settings(max_examples=6)
@given(texts=documents, length=st.integers(1, 8), values=st.integers(1, 20))
def test_the_loss_equals_the_reference(alpha: float, texts: list[list[int]], length: int, values: int) -> None:
    model = random_model(tiny_config())
    reference = Reference(model.config, weights_of(model), alpha)
    nats, scored = 0.0, 0
    for text in texts:
        for start in range(0, len(text) - 1, length):
            window = text[start : start + length + 1]
            logits = reference.logits(window[:-1])
            for position, target in enumerate(window[1:]):
                nats += math.log(np.exp(logits[position]).sum()) - logits[position][target]
                scored += 1
    held_out = HeldOut(tuple(np.array(text, dtype=np.int32) for text in texts), text_bytes=37)

    def forward(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, alpha)
        return logits

    if not scored:
        with pytest.raises(DataError, match="empty"):
            mean_loss(forward, held_out, length, values, torch.device("cpu"))
        return
    loss = mean_loss(forward, held_out, length, values, torch.device("cpu"))
    assert loss.tokens == scored
    assert loss.nats_per_token == pytest.approx(nats / scored, rel=1e-4)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / 37, rel=1e-4)


@pytest.mark.parametrize("vocab_size", [300, 1_000])
def test_a_batch_holds_no_more_logits_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> None:
    monkeypatch.setattr("tolserve.train.evaluate.LOGITS", 60_000)
    model = random_model(tiny_config(vocab_size=vocab_size))
    shapes: list[torch.Size] = []
    model.register_forward_hook(lambda module, inputs, logits: shapes.append(logits.shape))
    held_out = HeldOut(tuple(np.arange(n, dtype=np.int32) for n in (90, 41, 5)), text_bytes=1)
    loss = evaluate(model, held_out, 10)
    assert loss.tokens == 89 + 40 + 4 == sum(rows * length for rows, length, _ in shapes)
    assert max(shape.numel() for shape in shapes) <= 60_000
    assert len(shapes) == {300: 3, 1_000: 5}[vocab_size]  # 12 windows of ten together, as far as they may, 9 and 4
