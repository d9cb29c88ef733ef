"""Who sits a step out: by what it costs, never everybody, never twice running."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.driver import Answers, OpenEngine, assert_idle, collect, finish, request, submit
from tolserve.engine.engine import Engine
from tolserve.engine.request import Request, SamplingParams
from tolserve.engine.sequence import Sequence
from tolserve.engine.sitout import SitOut


class Records:
    """What SitOut asks of a pager."""

    def __init__(self, device: set[int], host: set[int], read_seconds: float) -> None:
        self.device, self.host, self.read_seconds = device, host, read_seconds

    ahead = 0

    def present(self, token: int) -> bool:
        return token in self.device


def sequence(number: int, token: int, pending: int = 1) -> Sequence:
    made = Sequence(
        Request(str(number), (*range(100, 100 + 9 - pending), *[token] * pending), SamplingParams(max_tokens=8)), 0.0
    )
    made.computed = 9 - pending
    return made


def rule(records: Any, step_seconds: float | None) -> SitOut:
    sit_out = SitOut(records, 100)
    if step_seconds is not None:
        sit_out._step_seconds = step_seconds
    return sit_out


@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    device=st.sets(st.integers(0, 9)),
    host=st.sets(st.integers(0, 9)),
    step_ms=st.integers(1, 100),
    read_ms=st.integers(0, 20),
)
def test_those_sit_out_whose_record_is_on_disk_where_that_is_cheaper(
    tokens: list[int], device: set[int], host: set[int], step_ms: int, read_ms: int
) -> None:
    running = [sequence(number, token) for number, token in enumerate(tokens)]
    sit_out = rule(Records(device, host, read_ms / 1000), step_ms / 1000)
    late = {str(number) for number, token in enumerate(tokens) if token not in device | host}
    cheaper = step_ms * len(late) < read_ms * len(tokens)
    expected = late if cheaper and len(late) < len(tokens) else set()
    assert sit_out.choose(running) == expected
    assert sit_out.choose(running) == (set() if expected else expected)  # the same ones never twice running
    assert sit_out.choose(running) == expected


def test_prompts_and_an_unknown_step_time_make_nobody_sit_out() -> None:
    records = Records({1}, set(), 1.0)
    assert rule(records, None).choose([sequence(0, 1), sequence(1, 2)]) == set()
    assert rule(records, 0.001).choose([sequence(0, 1), sequence(1, 2, pending=3)]) == set()
    assert rule(records, 0.001).choose([sequence(0, 1), sequence(1, 2)]) == {"1"}


def test_only_those_sit_out_whose_reads_may_start() -> None:
    records = Records({0}, set(), 1.0)
    sit_out = SitOut(records, 3)  # type: ignore[arg-type]
    sit_out._step_seconds = 0.001
    running = [sequence(number, token) for number, token in enumerate([0, 1, 2, 3, 4])]
    records.ahead = 1
    assert sit_out.choose(running) == {"1", "2"}


def impatient(engine: Engine, step_seconds: float) -> None:
    """As if steps took so long, whatever the clock says."""
    assert engine._sit_out is not None
    engine._sit_out._step_seconds = step_seconds
    engine._sit_out.ran = lambda *_: None  # type: ignore[method-assign]


@pytest.mark.parametrize("step_seconds", [1e-9, 1e9])
def test_sequences_that_sit_out_finish_with_the_same_answers(engine_of: OpenEngine, step_seconds: float) -> None:
    requests = [request(str(number), list(range(10 * number, 10 * number + 9)), 24) for number in range(6)]
    with engine_of(device_cache="100%") as engine:
        submit(engine, requests)
        expected = finish(engine)
    with engine_of(device_cache="24", max_num_batched_tokens=16) as engine:
        impatient(engine, step_seconds)
        submit(engine, requests)
        answers: Answers = {}
        sat_out = 0
        while engine.busy:
            running = {s.request_id for s in engine.scheduler.running if s.pending == 1}
            before = engine.metrics.sat_out.labels().value
            collect(answers, engine.step())
            now = engine.metrics.sat_out.labels().value - before
            assert now == 0 or now < len(running)
            sat_out += int(now)
        assert (sat_out > 0) == (step_seconds < 1)
        assert {name: answer.tokens for name, answer in answers.items()} == {
            name: answer.tokens for name, answer in expected.items()
        }
        assert_idle(engine)
