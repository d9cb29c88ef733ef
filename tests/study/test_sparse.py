"""Pruning: counts are exact, and each method does what its paper defines, told again the slow way."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny import random_model, tiny_config
from tolserve.study.params import count_parameters
from tolserve.study.report import StudyError
from tolserve.study.sparse import METHODS, active_parameters, prune, share_to_keep, sparsegpt, wanda

shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 1.0), st.integers(0, 99))


def layer_inputs(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random matrix, and X^T X of inputs that differ in size and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(5 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight, x.T @ x


@given(shapes)
def test_wanda_keeps_each_rows_weights_that_matter_most(shape: tuple[int, int, float, int]) -> None:
    rows, columns, keep, seed = shape
    weight, gram = layer_inputs(rows, columns, seed)
    pruned = wanda(weight, gram, keep)
    assert pruned.count_nonzero() == round(rows * keep * columns)
    for row, kept in zip(weight.tolist(), pruned.tolist(), strict=True):
        score = [abs(w) * float(gram[j, j]) ** 0.5 for j, w in enumerate(row)]
        count = sum(w != 0 for w in kept)
        assert abs(count - keep * columns) <= 1
        best = sorted(range(columns), key=lambda j: -score[j])[:count]
        assert kept == [w if j in best else 0.0 for j, w in enumerate(row)]


def sparsegpt_by_definition(weight: Tensor, gram: Tensor, keep: float, block: int) -> np.ndarray:
    """One column after the other with the inverse Hessian of the columns that are left, inverted anew each time."""
    hessian = gram.double().numpy() + 0.01 * float(gram.diagonal().mean()) * np.eye(len(gram))
    inverse = [np.linalg.inv(hessian[j:, j:]) for j in range(len(gram))]
    left = weight.double().numpy().copy()
    dropped = np.zeros(left.shape, bool)
    for j in range(left.shape[1]):
        if j % block == 0:
            columns = range(j, min(j + block, left.shape[1]))
            keep_here = round(keep * len(left) * columns.stop) - round(keep * len(left) * columns.start)
            costs = sorted((left[i, k] ** 2 / inverse[k][0, 0], i, k) for i in range(len(left)) for k in columns)
            for _, i, k in costs[: len(costs) - keep_here]:
                dropped[i, k] = True
        for i in np.flatnonzero(dropped[:, j]):
            left[i, j:] -= left[i, j] / inverse[j][0, 0] * inverse[j][0]
            left[i, j] = 0
    return left


@given(shapes, st.integers(1, 10))
def test_sparsegpt_equals_its_definition(shape: tuple[int, int, float, int], block: int) -> None:
    rows, columns, keep, seed = shape
    weight, gram = layer_inputs(rows, columns, seed)
    pruned = sparsegpt(weight, gram, keep, block)
    expected = sparsegpt_by_definition(weight, gram, keep, block)
    assert np.allclose(pruned, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert pruned.count_nonzero() == round(rows * keep * columns)


def test_sparsegpt_loses_less_of_the_output_than_wanda_and_wanda_less_than_magnitude() -> None:
    """On inputs that differ in size, as a model's do, and hang together a little."""
    weight = torch.randn(40, 30)
    x = torch.randn(200, 30) @ (torch.logspace(-1, 1, 30).diag() + 0.2 * torch.randn(30, 30))
    gram = x.T @ x
    half = weight.abs() >= weight.abs().median()
    losses = []
    for pruned in (sparsegpt(weight, gram, 0.5), wanda(weight, gram, 0.5), weight * half):
        lost = pruned - weight
        losses.append(float((lost @ gram * lost).sum()))
    assert losses == sorted(losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_a_pruned_model_has_as_many_active_parameters_as_asked(method: str, share: float) -> None:
    base = random_model(tiny_config("base"))
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    whole = count_parameters(base.config).active
    assert active_parameters(base) == whole
    asked = round(share * whole)
    pruned = prune(base, method, share_to_keep(base, asked), torch.randint(300, (3, 16)))
    linears = 2 * 7  # matrices whose counts are rounded one by one
    assert abs(active_parameters(pruned) - asked) <= linears / 2
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    for name, weight in pruned.named_parameters():
        if weight.ndim == 1 or "embed" in name or (share == 1.0 and method != "sparsegpt"):
            assert torch.equal(weight, before[name])


def test_active_parameters_are_what_serving_reads() -> None:
    for variant in ("base", "memory", "flex"):
        model = random_model(tiny_config(variant, tie_word_embeddings=False))
        assert active_parameters(model) == count_parameters(model.config).active


def test_layers_are_pruned_on_what_the_pruned_layers_below_hand_up() -> None:
    """Wanda's norms at the second layer are those of the inputs that it has once the first is pruned."""
    base = random_model(tiny_config("base", num_hidden_layers=2))
    tokens = torch.randint(300, (2, 12))
    pruned = prune(base, "wanda", 0.4, tokens)
    seen = []
    target = pruned.model.layers[1].self_attn.q_proj
    hook = target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    pruned(tokens)
    hook.remove()
    gram = seen[0].T @ seen[0]
    original = base.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(target.weight, wanda(original, gram, 0.4))


@pytest.mark.parametrize("active", [0, 100, 10**9])
def test_a_count_that_pruning_cannot_reach_is_refused(active: int) -> None:
    with pytest.raises(StudyError, match="cannot be pruned"):
        share_to_keep(random_model(tiny_config("base")), active)
