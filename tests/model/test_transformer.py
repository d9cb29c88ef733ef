"""The forward pass against a slow float64 reference, and the serving form against the training form."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import Reference, weights_of
from tiny import random_model, tiny_config
from tolserve.model.blocks import rotary_tables
from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer, causal_attention, no_rows

# float32 sums over a width of 32 in two layers, logits with a spread of several units (checked below): rounding gives
# a few 1e-6, and any wrong term far more.
TOLERANCE = 1e-4

CONFIGS = {
    "base": tiny_config("base"),
    "base-multihead": tiny_config("base", num_key_value_heads=4),
    "memory": tiny_config("memory"),
    "memory-multihead": tiny_config("memory", num_key_value_heads=4),
    "memory-one-kv-head": tiny_config("memory", num_key_value_heads=1),
    "memory-untied": tiny_config("memory", tie_word_embeddings=False, rope_theta=500.0, rms_norm_eps=0.1),
    "flex-1": tiny_config("flex", flex_beta=1),
    "flex-2": tiny_config("flex", flex_beta=2),
    "flex-3": tiny_config("flex", flex_beta=3),
}
WITH_MEMORY = [name for name in CONFIGS if not name.startswith("base")]


def serving_form(model: Transformer) -> Transformer:
    serving = Transformer(model.config, with_memory=False)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "memory" not in name}
    serving.load_state_dict(weights)
    return serving.eval().requires_grad_(False)


def serve(serving: Transformer, tokens: Tensor, rows: Tensor) -> Tensor:
    """Logits of whole sequences from records [V, layers, d] given from outside."""
    cos, sin = rotary_tables(serving.config, tokens.shape[-1], tokens.device)

    def add_row(layer: int, x: Tensor) -> Tensor:
        return x + rows[tokens, layer]

    return serving.logits(serving.hidden(tokens, causal_attention(cos, sin), add_row))


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4)
@example(tokens=[5, 5, 0, 299, 17, 5, 120, 0, 64, 299, 1, 5], seed=1)
@given(tokens=st.lists(st.integers(0, 299), min_size=1, max_size=12), seed=st.integers(0, 1 << 16))
def test_logits_equal_the_reference(name: str, tokens: list[int], seed: int) -> None:
    model = random_model(CONFIGS[name], seed)
    expected = Reference(CONFIGS[name], weights_of(model)).logits(tokens)
    assert expected.std() > 1  # else a wrong term could hide below the tolerance
    np.testing.assert_allclose(model(torch.tensor([tokens]))[0].numpy(), expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_alpha_scales_the_rows(name: str, alpha: float) -> None:
    model, tokens = random_model(CONFIGS[name]), [5, 17, 5, 200, 0]
    expected = Reference(CONFIGS[name], weights_of(model), alpha).logits(tokens)
    np.testing.assert_allclose(model(torch.tensor([tokens]), alpha)[0].numpy(), expected, atol=1e-4, rtol=1e-4)


def test_alpha_is_refused_where_there_are_no_rows() -> None:
    with pytest.raises(ValueError, match="alpha"):
        random_model(CONFIGS["base"])(torch.tensor([[1, 2]]), alpha=0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_its_past_alone(name: str) -> None:
    model = random_model(CONFIGS[name])
    tokens, changed = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([[3, 1, 4, 2, 6, 5]])
    assert torch.allclose(model(tokens)[:, :3], model(changed)[:, :3], atol=1e-5)
    assert not torch.allclose(model(tokens)[:, 3:], model(changed)[:, 3:], atol=1e-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_of_a_batch_do_not_meet(name: str) -> None:
    model, batch = random_model(CONFIGS[name]), torch.tensor([[3, 1, 4, 1], [9, 2, 6, 3]])
    alone = torch.cat([model(sequence[None]) for sequence in batch])
    assert torch.allclose(model(batch), alone, atol=1e-4)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_serving_from_the_same_rows_gives_the_same_bits(name: str) -> None:
    model = random_model(CONFIGS[name])
    tokens = torch.tensor([[7, 7, 250, 0, 31, 7, 299]])
    distinct = tokens.unique()  # the rows as the training form computes them: once per distinct token
    embedding = model.model.embed_tokens(distinct)
    rows = torch.zeros(300, model.config.num_hidden_layers, model.config.hidden_size)
    rows[distinct] = torch.stack([layer.memory_row(embedding) for layer in model.model.layers], dim=1)
    assert torch.equal(serve(serving_form(model), tokens, rows), model(tokens))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_serving_from_a_tabulated_vocabulary_gives_the_same_logits(name: str) -> None:
    model = random_model(CONFIGS[name])
    rows = torch.stack([layer.memory_row(model.model.embed_tokens.weight) for layer in model.model.layers], dim=1)
    tokens = torch.tensor([[7, 7, 250, 0, 31, 7, 299], [1, 2, 3, 4, 5, 6, 8]])
    assert torch.allclose(serve(serving_form(model), tokens, rows), model(tokens), atol=1e-4)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_the_serving_form_holds_no_memory_weights(name: str) -> None:
    names = {parameter for parameter, _ in Transformer(CONFIGS[name], with_memory=False).named_parameters()}
    trained = {parameter for parameter, _ in Transformer(CONFIGS[name], with_memory=True).named_parameters()}
    assert names == {parameter for parameter in trained if "memory" not in parameter}
    assert len(trained) - len(names) == 4 * CONFIGS[name].num_hidden_layers


def test_a_base_model_never_asks_for_a_row() -> None:
    model = random_model(CONFIGS["base"])
    tokens = torch.tensor([[1, 2, 3]])
    cos, sin = rotary_tables(model.config, 3, tokens.device)
    assert torch.equal(model.logits(model.hidden(tokens, causal_attention(cos, sin), no_rows)), model(tokens))
    with pytest.raises(RuntimeError, match="row"):
        no_rows(0, torch.zeros(1))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_gradients_of_repeated_tokens_add_up(name: str) -> None:
    """Rows are computed once per distinct token; the gradient must be that of computing them per position."""
    model = random_model(CONFIGS[name], spread=8.0).requires_grad_(True)
    tokens, target = torch.tensor([[7, 7, 8, 7]]), torch.tensor([1, 2, 3, 4])
    cos, sin = rotary_tables(model.config, 4, tokens.device)
    embedding = model.model.embed_tokens

    def add_row(layer: int, x: Tensor) -> Tensor:
        return x + model.model.layers[layer].memory_row(embedding(tokens))

    per_position = model.logits(model.hidden(tokens, causal_attention(cos, sin), add_row))
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(per_position[0], target), parameters)
    found = torch.autograd.grad(torch.nn.functional.cross_entropy(model(tokens)[0], target), parameters)
    for parameter, a, b in zip(names, found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4), parameter
        assert b.abs().max() > 0, parameter


def test_rotary_tables_follow_the_angles() -> None:
    cos, sin = rotary_tables(tiny_config(rope_theta=100.0), 50, torch.device("cpu"))
    for position in (0, 1, 49):
        for pair in range(4):
            angle = position * 100.0 ** (-pair / 4)
            for column in (pair, pair + 4):
                assert cos[position, column].item() == pytest.approx(np.cos(angle), abs=1e-6)
                assert sin[position, column].item() == pytest.approx(np.sin(angle), abs=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_initial_weights_follow_the_seed_and_scale_residual_outputs(name: str) -> None:
    config = ModelConfig(**vars(CONFIGS[name]) | {"hidden_size": 128, "intermediate_size": 128})
    models = [Transformer(config, with_memory=True) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialise(seed)
    last_compute = f"compute.{config.flex_beta - 1}.weight"
    for (parameter, first), (_, again), (_, other) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(first, again)
        if first.ndim == 1:
            assert torch.equal(first, torch.ones_like(first))
            continue
        assert not torch.equal(first, other)
        output = parameter.endswith(("o_proj.weight", "down_proj.weight", last_compute))
        assert first.std().item() == pytest.approx(0.02 * (0.5 if output else 1.0), rel=0.05), parameter
