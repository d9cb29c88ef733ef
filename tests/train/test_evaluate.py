"""Held-out loss against a slow reference that scores one token at a time."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import Reference, weights_of
from tiny import random_model, tiny_config
from tolserve.train.data import DataError
from tolserve.train.evaluate import HeldOut, evaluate, windows

documents = st.lists(st.lists(st.integers(0, 299), min_size=1, max_size=14), min_size=1, max_size=5)


@given(size=st.integers(0, 50), length=st.integers(1, 20))
def test_windows_score_every_token_but_the_first_once(size: int, length: int) -> None:
    cut = list(windows(np.arange(size, dtype=np.int32), length))
    assert [t for window in cut for t in window[1:].tolist()] == list(range(1, size))
    assert all(2 <= len(window) <= length + 1 for window in cut)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
@settings(max_examples=6)
@given(texts=documents, length=st.integers(1, 8), batch=st.integers(1, 3))
def test_the_loss_equals_the_reference(alpha: float, texts: list[list[int]], length: int, batch: int) -> None:
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
    if not scored:
        with pytest.raises(DataError, match="empty"):
            evaluate(model, held_out, length, batch=batch, alpha=alpha)
        return
    loss = evaluate(model, held_out, length, batch=batch, alpha=alpha)
    assert loss.tokens == scored
    assert loss.nats_per_token == pytest.approx(nats / scored, rel=1e-4)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / 37, rel=1e-4)
