"""Steps launched ahead of the host's knowledge give what steps one by one give, and leave nothing behind."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.driver import Answers, OpenEngine, assert_idle, request, serve
from engine.test_engine import assert_same_output, prompt_of
from tol.tables import value
from tolserve.engine.ahead import LookaheadEngine
from tolserve.engine.assemble import assemble
from tolserve.engine.config import EngineSettings
from tolserve.engine.request import Request

TIERS: list[dict[str, Any]] = [
    {"device_cache": "100%"},
    {"device_cache": "64"},
    {"device_cache": "64", "host_cache": "40"},
    {"device_cache": "30", "host_cache": "100%"},
    {"device_cache": "16", "max_num_batched_tokens": 16},
]


@contextlib.contextmanager
def open_ahead(model_dir: Path, cache_dir: Path, **options: Any) -> Iterator[LookaheadEngine]:
    settings = EngineSettings(model=str(model_dir), cache_dir=str(cache_dir), device="cpu", **options)
    engine = assemble(settings, ahead=True)
    assert isinstance(engine, LookaheadEngine)
    try:
        yield engine
    finally:
        engine.close()


def requests_of(seed: int, count: int = 10) -> list[Request]:
    """Short and long, greedy and drawn; one in six wants log-probabilities, which no step runs ahead of."""
    dice = random.Random(seed)
    requests = []
    for index in range(count):
        drawn = {"temperature": 0.9, "top_k": 50, "seed": index} if dice.random() < 0.3 else {}
        scored = {"logprobs": 2} if dice.random() < 0.16 else {}
        prompt = prompt_of(dice.choice([1, 2, 3, 9, 25, 40]), seed * 100 + index)
        requests.append(request(f"r{index}", prompt, dice.randrange(1, 24), **drawn, **scored))
    return requests


@pytest.fixture(scope="module")
def right(engine_of: OpenEngine) -> Answers:
    """Each request by itself, one step after the other."""
    answers: Answers = {}
    with engine_of(device_cache="100%") as engine:
        for each in requests_of(0):
            answers |= serve(engine, [each])
    return answers


@pytest.mark.parametrize("tiers", TIERS)
def test_answers_are_those_of_steps_one_by_one(
    tiny_model_dir: Path, cache_dir: Path, right: Answers, tiers: dict[str, Any]
) -> None:
    with open_ahead(tiny_model_dir, cache_dir, **{"max_num_seqs": 6} | tiers) as engine:
        answers = serve(engine, requests_of(0))
        assert_same_output(answers, right)
        assert_idle(engine)
        for name in ("lookups_total", "hits_total", "misses_total", "fills_total", "evictions_total"):
            print(name, value(engine.registry, "tol_" + name))
        print("sat out", value(engine.registry, "num_sat_out_total"))
