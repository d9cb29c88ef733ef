"""Arithmetic per token, counted from the shape and again by torch."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny import tiny_config
from tolserve.model.transformer import Transformer
from tolserve.train.rate import distinct_share, matrix_rate, training_flops


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", ["base", "memory", "flex"])
def test_the_count_is_that_of_the_operations_that_run(variant: str, tied: bool) -> None:
    """torch counts attention as if nothing were masked; ours is causal, half of that."""
    model = Transformer(tiny_config(variant, tie_word_embeddings=tied), with_memory=True)
    model.initialise(0)
    tokens = torch.randint(30, (2, 32))
    distinct = len(tokens.unique()) / tokens.numel()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens).sum().backward()
    masked = 6 * model.config.num_hidden_layers * 32 * model.config.hidden_size
    found = counter.get_total_flops() / tokens.numel() - masked
    assert training_flops(model, 32, distinct) == pytest.approx(found, rel=1e-6)


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    model = Transformer(tiny_config("base"), with_memory=True)
    whole = training_flops(model, 1, 1.0)
    projection = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    assert training_flops(model, 1, 1.0) == whole - 2 * projection.numel()


def test_tokens_are_distinct_within_a_micro_batch() -> None:
    batch = np.array([[1, 1, 2, 9], [2, 3, 3, 9], [7, 7, 7, 9], [7, 7, 7, 9]])  # the last column is a target alone
    assert distinct_share([batch], rows=4) == 4 / 12
    assert distinct_share([batch], rows=2) == (3 + 1) / 12
    assert distinct_share([batch, batch], rows=1) == (2 + 2 + 1 + 1) / 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_rate_is_the_products_operations_over_their_time(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By a clock of which each look takes a twentieth of a second: a busy machine's own would only nearly agree."""
    clock = itertools.count()
    with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr("tolserve.train.rate.time.perf_counter", lambda: next(clock) / 20)
        rate = matrix_rate(torch.device("cpu"), dtype)
    looks = next(clock)
    products = (looks - 2) // 3  # one look before all, one behind the last, three with each
    assert products >= 3
    assert rate == pytest.approx(counter.get_total_flops() / products * 20)
