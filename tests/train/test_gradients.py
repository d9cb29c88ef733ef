"""A training step's gradient against difference quotients of a float64 reference that knows no autograd."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import Array, Reference, weights_of
from tiny import random_model, tiny_config
from tiny_run import recipe_of
from tolserve.model.config import ModelConfig
from tolserve.train.objective import Objective, loss_terms
from tolserve.train.ranks import ALONE

VARIANTS = {
    "base": {"variant": "base"},
    "memory": {"variant": "memory"},
    "flex-1": {"variant": "flex", "flex_beta": 1},
    "flex-2": {"variant": "flex", "flex_beta": 2},
    "flex-3": {"variant": "flex", "flex_beta": 3},
}
# Two sequences of three targets, with tokens that come again, in one sequence and in the other.
BATCH = np.array([[2, 5, 2, 0], [5, 2, 6, 6]], dtype=np.int32)
Z_LOSS = 0.1
STEP = 1e-5  # central differences in float64 are then right to about ten digits


def smallest(name: str, **changes: Any) -> ModelConfig:
    """A few hundred parameters, so that each can be moved."""
    shape = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 3, "num_attention_heads": 2}
    return tiny_config(**VARIANTS[name] | shape | {"num_key_value_heads": 1} | changes)


def log_softmax(logits: Array) -> Array:
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


def objective(config: ModelConfig, weights: dict[str, Array], teacher: list[Array] | None) -> float:
    """Mean over all targets of cross entropy, or divergence from a teacher, and z-loss."""
    terms = []
    for index, sequence in enumerate(BATCH.tolist()):
        logits = Reference(config, weights).logits(sequence[:-1])
        found = log_softmax(logits)
        for position, target in enumerate(sequence[1:]):
            normaliser = logits[position][target] - found[position][target]
            term = -found[position][target]
            if teacher is not None:
                expected = log_softmax(teacher[index][position])
                term = (np.exp(expected) * (expected - found[position])).sum()
            terms.append(term + Z_LOSS * normaliser**2)
    return float(np.mean(terms))


def difference_quotients(value: Callable[[], float], weights: dict[str, Array]) -> dict[str, Array]:
    gradient = {name: np.zeros_like(tensor) for name, tensor in weights.items()}
    for name, tensor in weights.items():
        for place in np.ndindex(tensor.shape):
            kept = tensor[place]
            tensor[place] = kept + STEP
            above = value()
            tensor[place] = kept - STEP
            gradient[name][place] = (above - value()) / (2 * STEP)
            tensor[place] = kept
    return gradient


@pytest.mark.parametrize(("name", "distil"), [*((name, False) for name in VARIANTS), ("memory", True)])
def test_the_gradient_is_the_reference_functions(name: str, distil: bool) -> None:
    config = smallest(name)
    model, teacher = random_model(config, spread=12.0).requires_grad_(True), random_model(smallest("base"), 3)
    weights = {key: tensor.copy() for key, tensor in weights_of(model).items()}
    whole = Reference(teacher.config, weights_of(teacher))
    taught = [whole.logits(sequence[:-1]) for sequence in BATCH.tolist()] if distil else None
    expected = difference_quotients(lambda: objective(config, weights, taught), weights)
    for pieces in (1, 2):
        recipe = recipe_of(Path(), batch=2, length=3, z_loss=Z_LOSS, accumulate=pieces, init_from="x", distil=distil)
        model.zero_grad()
        Objective(model, recipe, ALONE, teacher if distil else None).backward(BATCH)
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            size = np.abs(expected[parameter_name]).max()
            assert size > 1e-4, parameter_name  # else an error could hide
            difference = np.abs(parameter.grad.double().numpy() - expected[parameter_name]).max()
            assert difference <= 2e-5 * size, (parameter_name, difference / size)


def test_the_loss_that_is_logged_is_the_mean_cross_entropy() -> None:
    model = random_model(smallest("memory")).requires_grad_(True)
    expected = objective(model.config, weights_of(model), None)
    penalties = []
    for sequence in BATCH.tolist():
        logits = torch.from_numpy(Reference(model.config, weights_of(model)).logits(sequence[:-1]))
        penalties += logits.logsumexp(-1).square().tolist()
    for pieces in (1, 2):
        recipe = recipe_of(Path(), batch=2, length=3, z_loss=Z_LOSS, accumulate=pieces)
        found = Objective(model, recipe, ALONE).backward(BATCH)
        assert found == pytest.approx(expected - Z_LOSS * np.mean(penalties), rel=1e-5)


def test_distilling_takes_no_gradient_of_the_texts_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share would be zero, at the price of a pass over all logits."""
    ran: list[Tensor] = []

    def watched(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        cross_entropy, penalty = loss_terms(logits, targets, z_loss)
        cross_entropy.register_hook(ran.append)
        return cross_entropy, penalty

    monkeypatch.setattr("tolserve.train.objective.loss_terms", watched)
    model, teacher = random_model(smallest("memory")).requires_grad_(True), random_model(smallest("base"), 3)
    for distil in (False, True):
        recipe = recipe_of(Path(), batch=2, length=3, init_from="x", distil=distil)
        Objective(model, recipe, ALONE, teacher if distil else None).backward(BATCH)
        assert len(ran) == 1  # of the first, which learns the text
