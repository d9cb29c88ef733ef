"""Every precision of weights, keys and values: the same bits from every tier, and close to the model computed whole."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver import OpenEngine, assert_idle, replay, request, serve, serve_recorded
from engine.test_engine import STEP, mixed_requests, prompt_of
from model.test_serving import logits_of, rows_of
from tol.tables import value
from tolkernels.cpu import library
from tolserve.model.checkpoint import load_transformer
from tolserve.model.serving import ServingModel

# Largest difference of a log-probability (up to 16) that is allowed: sums in another order; activations that integer
# weights round to 16 bits; keys and values rounded to 8 or 11 bits, whose products go through two layers.
BOUNDS = {"auto": 1e-4, "int8": 1e-3, "int4": 1e-3, "bfloat16": 0.05, "float16": 0.01}
OPTIONS: list[dict[str, Any]] = [
    {"weights": "int8"},
    {"weights": "int4"},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"dtype": "bfloat16", "weights": "int8"},
]


def name_of(options: dict[str, Any]) -> str:
    return " ".join(options.values())


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_answers_are_bit_identical_whatever_the_tiers(engine_of: OpenEngine, options: dict[str, Any]) -> None:
    requests, shape = mixed_requests(), {"max_num_seqs": 6, "max_num_batched_tokens": STEP} | options
    with engine_of(device_cache="100%", **shape) as engine:
        answers, steps = serve_recorded(engine, {0: requests[:4], 3: requests[4:]})
    with engine_of(device_cache=str(STEP), **shape) as engine:
        again = replay(engine, requests, steps)
        assert value(engine.registry, "tol_misses_total") > 0
        assert_idle(engine)
    assert {name: answer.text for name, answer in again.items()} == {name: a.text for name, a in answers.items()}


@pytest.mark.parametrize("options", [{"weights": "auto"}, *OPTIONS], ids=name_of)
def test_scores_are_those_of_the_model_computed_whole(
    engine_of: OpenEngine, tiny_model_dir: Path, options: dict[str, Any]
) -> None:
    prompt = prompt_of(37, 1)
    with engine_of(device_cache="20", max_num_batched_tokens=STEP, **options) as engine:
        answer = serve(engine, [request("r", prompt, 12, logprobs=0, prompt_logprobs=0)])["r"]
    tokens = torch.tensor(prompt + answer.tokens)
    rows = rows_of(load_transformer(tiny_model_dir, with_memory=True, dtype=torch.float32)).to(torch.bfloat16)
    whole = ServingModel.load(tiny_model_dir, dtype=torch.float32, weights=options.get("weights", "auto"))
    exact = logits_of(whole, tokens, rows).log_softmax(-1)[:-1].gather(-1, tokens[1:, None]).squeeze(-1)
    scores = [score for score in answer.prompt_logprobs or [] if score is not None] + answer.logprobs
    worst = float((torch.tensor([score.logprob for score in scores]) - exact).abs().max())
    assert worst < max(BOUNDS[each] for each in options.values())


@pytest.mark.skipif(library() is None, reason="torch's products depend on the batch")
@pytest.mark.parametrize("options", [{"weights": "auto"}, {"weights": "int8"}, {"weights": "int4"}], ids=name_of)
def test_neighbours_change_no_bit_on_the_cpu(engine_of: OpenEngine, options: dict[str, Any]) -> None:
    """With the compiled kernels, as long as no prompt is split in other places."""
    alone = {}
    with engine_of(device_cache="100%", **options) as engine:
        for each in mixed_requests():
            alone |= serve(engine, [each])
    with engine_of(device_cache="100%", **options) as engine:
        together = serve(engine, mixed_requests())
    assert {name: answer.text for name, answer in together.items()} == {name: a.text for name, a in alone.items()}
