"""The sampler against the slow obvious way, and its draws against what a fair die does."""

import itertools
from collections import Counter
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolserve.engine import sampler
from tolserve.engine.request import SamplingParams
from tolserve.engine.sampler import choose, draw_all, logprobs, uniform

SLACK = 1e-9  # cumulative sums of another order may fall on the other side of a bound

# Few distinct values among them, so that ties are common.
logit = st.one_of(
    st.floats(-30, 30, width=32), st.floats(-2, 2, width=32), st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0])
)
logit_rows = st.lists(logit, min_size=1, max_size=40).map(lambda values: np.array(values, np.float32))
params = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([1.0, 0.7, 0.01, 2.0, 1.3]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
)


def drawn(logits: npt.NDArray[np.float32], params: SamplingParams, top_p: float, min_p: float, draw: float) -> int:
    """One token at a time, in plain Python floats."""
    scores = [float(value) / params.temperature for value in logits]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.top_k:
        order = order[: params.top_k]
    weights = [float(np.exp(scores[token] - scores[order[0]])) for token in order]
    shares = [weight / sum(weights) for weight in weights]
    kept, before = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if not kept or (before < top_p and share >= min_p * shares[0]):
            kept.append((token, share))
        before += share
    left = draw * sum(share for _, share in kept)
    for token, share in kept:
        left -= share
        if left < 0:
            return token
    return kept[-1][0]


def sample(logits: Tensor, params: SamplingParams, position: int) -> int:
    return int(choose(logits[None], [params], [position]))


@given(logit_rows, params, st.integers(1, 2**20), st.sampled_from([1, 2, 5, 1024]))
@settings(max_examples=600)
def test_a_token_is_drawn_as_by_hand(
    logits: npt.NDArray[np.float32], params: SamplingParams, position: int, candidates: int
) -> None:
    """By a sort of all, and by ranking the first few candidates, however few."""
    draw = uniform(params.seed, params.choice, position)
    slack = (-SLACK, 0.0, SLACK)
    right = {
        drawn(logits, params, params.top_p + a, params.min_p + b, draw + c)
        for a, b, c in itertools.product(slack, slack, slack)
    }
    with mock.patch.object(sampler, "FIRST_CANDIDATES", candidates):
        assert sample(torch.from_numpy(logits), params, position) in right
    assert int(draw_all(torch.from_numpy(logits)[None], [params], [position])) in right


@given(st.integers(0, 2**32), st.lists(st.tuples(params, st.integers(1, 99)), min_size=1, max_size=6))
@settings(max_examples=30)
def test_a_batch_gets_what_each_gets_alone(seed: int, asked: list[tuple[SamplingParams, int]]) -> None:
    """Greedy ones among them, over more logits than the first candidates."""
    logits = torch.randn(len(asked), 20_000, generator=torch.Generator().manual_seed(seed)).mul(3).round(decimals=2)
    each = [SamplingParams(**vars(p) | {"temperature": 0.0 if n % 3 == 0 else p.temperature}) for p, n in asked]
    positions = [position for _, position in asked]
    chosen = choose(logits, each, positions).tolist()
    assert chosen == [sample(row, p, n) for row, p, n in zip(logits, each, positions, strict=True)]
    assert chosen == draw_all(logits, each, positions).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_give_some_token(bad: float) -> None:
    logits = torch.full((3, 2000), bad)
    logits[1, 7], logits[2, :3] = 1.0, 0.5
    for temperature in (0.0, 1.0):
        each = [SamplingParams(1, temperature=temperature, top_p=0.9)] * 3
        for tokens in (choose(logits, each, [1, 2, 3]), draw_all(logits, each, [1, 2, 3])):
            assert ((tokens >= 0) & (tokens < 2000)).all()


@given(logit_rows, params, st.integers(0, 99))
@settings(max_examples=40)
def test_temperature_0_takes_the_first_best_whatever_the_rest(
    logits: npt.NDArray[np.float32], params: SamplingParams, position: int
) -> None:
    greedy = SamplingParams(**vars(params) | {"temperature": 0.0})
    assert sample(torch.from_numpy(logits), greedy, position) == int(np.argmax(logits))


def test_min_p_is_a_share_of_the_best_tokens_probability() -> None:
    """Twenty tokens of 4% each and twenty of 1%: half of 4% is asked for, which no token of 1% has."""
    logits = torch.tensor([4.0, 1.0] * 20).log()
    tokens = {sample(logits, SamplingParams(max_tokens=1, min_p=0.5), position) for position in range(300)}
    assert tokens == set(range(0, 40, 2))


def test_greedy_does_not_draw_from_logits_that_overflow_when_divided() -> None:
    logits = torch.tensor([3e38, -3e38, 3.1e38])
    assert sample(logits, SamplingParams(max_tokens=1, temperature=0.0), 5) == 2
    assert sample(logits, SamplingParams(max_tokens=1, temperature=1e-5), 5) == 2


def chi_square(counts: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# With 19 degrees of freedom a fair die exceeds 50 once in 7,000 runs; the draws are fixed, so these pass or never do.
DRAWS, BINS, LIMIT = 3000, 20, 50.0


@pytest.mark.parametrize("varied", ["seed", "choice", "position"])
def test_draws_are_uniform_along_each_argument(varied: str) -> None:
    fixed = {"seed": 7, "choice": 0, "position": 12}
    values = np.array([uniform(**fixed | {varied: index}) for index in range(DRAWS)])
    assert ((values >= 0) & (values < 1)).all()
    counts = np.histogram(values, BINS, (0, 1))[0].astype(np.float64)
    assert chi_square(counts, np.full(BINS, DRAWS / BINS)) < LIMIT
    # Neighbours are independent: pairs fill the square evenly too.
    pairs = np.histogram2d(values[:-1], values[1:], (4, 5), ((0, 1), (0, 1)))[0].reshape(-1)
    assert chi_square(pairs, np.full(BINS, (DRAWS - 1) / BINS)) < LIMIT


def test_draws_differ_between_all_arguments() -> None:
    big = 2**64 - 1
    grid = list(itertools.product([0, 1, 2, 2**32, big], [0, 1, 2, 127], [0, 1, 2, 3, 131071]))
    draws = [uniform(*arguments) for arguments in grid]
    assert len(set(draws)) == len(grid)
    assert draws == [uniform(*arguments) for arguments in grid], "a draw depends on what was drawn before"


def test_sampled_tokens_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    params = SamplingParams(max_tokens=1, temperature=1.5, seed=3)
    counts = Counter(sample(logits, params, position) for position in range(DRAWS))
    expected = (logits.double() / 1.5).softmax(-1).numpy() * DRAWS
    assert chi_square(np.array([counts[token] for token in range(5)], np.float64), expected) < 25  # 4 degrees


@given(
    st.lists(st.lists(st.floats(-40, 40, width=32), min_size=7, max_size=7), min_size=1, max_size=5),
    st.lists(st.integers(0, 6), min_size=5, max_size=5),
    st.integers(0, 7),
)
@settings(max_examples=60)
def test_logprobs_are_those_of_float64(rows: list[list[float]], tokens: list[int], top: int) -> None:
    logits = torch.tensor(rows)
    ids = torch.tensor(tokens[: len(rows)])
    exact = logits.double().log_softmax(-1)
    scored = logprobs(logits, ids, top)
    assert [score.token for score in scored] == ids.tolist()
    for score, row in zip(scored, exact, strict=True):
        assert score.logprob == pytest.approx(float(row[score.token]), abs=1e-5)
        assert len(score.top) == top
        alternatives = dict(score.top)
        assert len(alternatives) == top, "an alternative is there twice"
        values = [value for _, value in score.top]
        assert values == sorted(values, reverse=True)
        assert values == pytest.approx(row.sort(descending=True).values[:top].tolist(), abs=1e-5)
        for token, value in score.top:
            assert value == pytest.approx(float(row[token]), abs=1e-5)
        assert alternatives.get(score.token, score.logprob) == score.logprob, "equal to the bit, or a client is misled"


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = (torch.arange(600) % 7).to(torch.bfloat16)[None]
    (score,) = logprobs(logits, torch.tensor([3]), 1)
    assert score.logprob == pytest.approx(float(logits.double().log_softmax(-1)[0, 3]), abs=1e-5)
