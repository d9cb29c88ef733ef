"""Steps launched ahead of the host's knowledge give what steps one by one give, and leave nothing behind."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.driver import Answer, Answers, OpenEngine, assert_idle, collect, finish, request, serve, submit
from engine.flights import ORDERS, open_ahead, requests_of
from engine.lagging import Late
from engine.test_engine import assert_same_output, prompt_of
from tol.tables import flip_byte, value
from tolserve.engine.assemble import SettingsError
from tolserve.engine.graphs import Decoder
from tolserve.engine.request import Request, Usage
from tolserve.model.build import build_table
from tolserve.tol.frequencies import read_frequencies
from tolserve.tol.table import Table

TIERS: list[dict[str, Any]] = [
    {"device_cache": "100%"},
    {"device_cache": "64"},
    {"device_cache": "64", "host_cache": "40"},
    {"device_cache": "30", "host_cache": "100%"},
    {"device_cache": "16", "max_num_batched_tokens": 16},
]


Alone = Callable[[int], Answers]


@pytest.fixture(scope="module")
def alone(engine_of: OpenEngine) -> Iterator[Alone]:
    """`alone(seed)`: requests_of(seed), each by itself, one step after the other."""
    known: dict[int, Answers] = {}
    with engine_of(device_cache="100%") as engine:

        def answers(seed: int) -> Answers:
            if seed not in known:
                known[seed] = {}
                for each in requests_of(seed):
                    known[seed] |= serve(engine, [each])
            return known[seed]

        yield answers


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("lagging", [False, True])
def test_answers_are_those_of_steps_one_by_one(
    tiny_model_dir: Path, cache_dir: Path, alone: Alone, tiers: dict[str, Any], lagging: bool
) -> None:
    options = {"max_num_seqs": 6} | tiers
    with open_ahead(tiny_model_dir, cache_dir, Late() if lagging else None, **options) as engine:
        assert_same_output(serve(engine, requests_of(0)), alone(0))
        assert_idle(engine)
        void = value(engine.registry, "num_sat_out_total")
        assert (void > 0) == ("100%" not in tiers.values()), "only records that are in no memory make anybody wait"


def test_what_a_request_used_is_counted_once(
    tiny_model_dir: Path, cache_dir: Path, engine_of: OpenEngine, tmp_path: Path
) -> None:
    """A sequence whose record was nowhere ran twice, and looked it up once: a miss. Also when those that come meanwhile
    have a step put together anew while it waits."""
    asked = [request(f"r{i}", prompt_of(9, i), 20, token_hits=True) for i in range(6)]
    short = [request(f"s{i}", prompt_of(1 + i % 3, 50 + i), 2, token_hits=True) for i in range(20)]
    with engine_of(device_cache="64") as engine:
        expected = serve(engine, [*asked, *short])
    counts = tmp_path / "counts.npz"
    with open_ahead(tiny_model_dir, cache_dir, device_cache="24", tol_save_frequencies=str(counts)) as engine:
        submit(engine, asked)
        answers: Answers = {}
        for index, each in enumerate(short):
            for _ in range(4 + index % 3):  # of which the last run ahead
                collect(answers, engine.step())
            submit(engine, [each])
        finish(engine, answers)
        assert value(engine.registry, "num_sat_out_total") > 10
        assert not engine.scheduler.preemptions
        lookups, hits = (value(engine.registry, f"tol_{name}_total") for name in ("lookups", "hits"))
        used: list[Usage] = []
        for name, answer in answers.items():
            was = expected[name].usage
            assert answer.usage is not None
            assert was is not None
            assert answer.tokens == expected[name].tokens
            assert answer.usage.lookups == was.lookups
            assert len(answer.token_hits) == was.prompt_tokens + was.completion_tokens - 1
            assert answer.usage.stall_ms < 1000
            used.append(answer.usage)
        assert sum(usage.lookups - usage.hits for usage in used) >= lookups - hits, "a miss was nobody's"
        assert sum(usage.lookups for usage in used) >= lookups
        assert sum(usage.hits for usage in used) >= hits
        assert_idle(engine)
        engine.finish()
    ran = Counter(token for each in [*asked, *short] for token in [*each.prompt, *answers[each.request_id].tokens[:-1]])
    assert {token: n for token, n in enumerate(read_frequencies(counts, 300).tolist()) if n} == ran


def cut(answer: Answer, stops: tuple[int, ...]) -> list[int]:
    """The tokens of an answer up to the first of `stops`."""
    end = next((i for i, token in enumerate(answer.tokens) if token in stops), len(answer.tokens))
    return answer.tokens[: end + 1]


@given(
    seed=st.integers(0, 5),
    luck=st.integers(0, 2**32),
    late=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "max_num_seqs": st.integers(1, 8),
            "max_num_batched_tokens": st.sampled_from([8, 24, 512]),
            "device_cache": st.sampled_from(["8", "20", "64", "100%"]),
            "host_cache": st.sampled_from(["0", "6", "60"]),
            "kv_cache": st.sampled_from(["16KiB", "24KiB", "1MiB"]),
            "tol_policy": st.sampled_from(["lru", "context"]),
        }
    ),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_happens_meanwhile_answers_are_right(
    tiny_model_dir: Path,
    cache_dir: Path,
    alone: Alone,
    seed: int,
    luck: int,
    late: bool,
    options: dict[str, Any],
) -> None:
    """Requests that come and go, stop tokens, preemptions, tiers that change size."""
    dice = random.Random(luck)
    expected: dict[str, list[int]] = {}
    coming: list[Request] = []
    for each in requests_of(seed):
        answer = alone(seed)[each.request_id]
        stops = tuple(dice.sample(answer.tokens, 1)) if dice.random() < 0.4 else ()
        expected[each.request_id] = cut(answer, stops)
        coming.append(replace(each, sampling=replace(each.sampling, stop_token_ids=stops)))
    answers: Answers = {}
    gone: set[str] = set()
    device = Late(seed, dice.random(), dice.random()) if late else None
    with open_ahead(tiny_model_dir, cache_dir, device, max_model_len=64, **options) as engine:
        while coming or engine.busy:
            for _ in range(dice.choice([0, 0, 1, 3])):
                submit(engine, [coming.pop()] if coming else [])
            collect(answers, engine.step())
            if dice.random() < 0.03:
                name = dice.choice(list(expected))
                gone.add(name)
                engine.abort(name)
            if dice.random() < 0.03:
                engine.resize(*dice.choice([("20", None), ("64", "6"), (None, "30"), ("9", "0")]))
        assert_idle(engine)
    for name, tokens in expected.items():
        if name in answers:
            assert answers[name].tokens == (tokens[: len(answers[name].tokens)] if name in gone else tokens), name
    assert answers.keys() | gone == expected.keys()


@pytest.mark.parametrize("lagging", [False, True])
def test_a_record_that_cannot_be_read_ends_whoever_needs_it(
    tiny_model_dir: Path, cache_dir: Path, alone: Alone, tmp_path: Path, lagging: bool
) -> None:
    """In the middle of an answer: what came before it is right, and the others do not notice."""
    seed = next(seed for seed in range(9) if any(len(a.tokens) > 8 for a in alone(seed).values()))
    victim = max(alone(seed), key=lambda name: len(alone(seed)[name].tokens))
    known = {token for each in requests_of(seed) for token in each.prompt}
    known |= {token for name, answer in alone(seed).items() if name != victim for token in answer.tokens}
    tokens = alone(seed)[victim].tokens
    place, bad = next((i, token) for i, token in enumerate(tokens[:-1]) if token not in known)
    build_table(tiny_model_dir, tmp_path / "tol")
    flip_byte(Table.open(tmp_path / "tol"), bad)
    device = Late() if lagging else None
    with open_ahead(tiny_model_dir, cache_dir, device, table=str(tmp_path / "tol"), device_cache="30") as engine:
        answers = serve(engine, requests_of(seed))
        failure = answers[victim].failure
        assert failure is not None
        assert f"record of token {bad}:" in failure.message
        assert answers[victim].tokens == tokens[: place + 1]
        for name, answer in answers.items():
            assert name == victim or answer.tokens == alone(seed)[name].tokens
        assert value(engine.registry, "tol_read_errors_total") > 0
        assert_idle(engine)


def test_a_table_is_exchanged_between_two_steps(
    tiny_model_dir: Path, cache_dir: Path, alone: Alone, tmp_path: Path
) -> None:
    build_table(tiny_model_dir, tmp_path / "tol")
    with open_ahead(tiny_model_dir, cache_dir, Late(), table=str(tmp_path / "tol"), device_cache="64") as engine:
        submit(engine, requests_of(1))
        answers: Answers = {}
        for _ in range(9):
            collect(answers, engine.step())
        engine.reopen()
        finish(engine, answers)
        assert {n: a.tokens for n, a in answers.items()} == {n: a.tokens for n, a in alone(1).items()}
        assert_idle(engine)


def no_memory(*args: Any) -> None:
    raise MemoryError("somebody else has it")


def test_a_change_that_leaves_no_memory_for_graphs_ends_nothing(
    tiny_model_dir: Path,
    cache_dir: Path,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_ahead(tiny_model_dir, cache_dir, device_cache="64") as engine:
        submit(engine, requests_of(1))
        answers: Answers = {}
        for _ in range(9):
            collect(answers, engine.step())
        monkeypatch.setattr(engine.decoder, "capture", no_memory)
        assert engine.resize("50", None).device.slots == 50
        assert "somebody else has it" in caplog.text
        finish(engine, answers)
        assert {n: a.tokens for n, a in answers.items()} == {n: a.tokens for n, a in alone(1).items()}
        assert_idle(engine)


def test_a_start_without_memory_for_its_steps_says_what_to_give_less_and_leaves_nothing(
    tiny_model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "capture", no_memory)
    shared = set(Path("/dev/shm").glob("tolserve-*"))
    with (
        pytest.raises(SettingsError, match=r"--device-cache 64 and --kv-cache auto.*somebody else"),
        open_ahead(tiny_model_dir, cache_dir, device_cache="64", host_cache="100%"),
    ):
        pass
    assert set(Path("/dev/shm").glob("tolserve-*")) <= shared


@pytest.mark.parametrize("name", ORDERS)
def test_each_order_is_missed_when_it_is_removed(
    tiny_model_dir: Path, cache_dir: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ORDERS[name](monkeypatch)
    noticed = 0
    for seed in range(4):
        options = {"max_num_seqs": 6, "device_cache": "32", "host_cache": "40" if seed % 2 else "8"}
        with open_ahead(tiny_model_dir, cache_dir, Late(seed, fill_haste=0.2), **options) as engine:
            try:
                answers = serve(engine, requests_of(seed))
                noticed += {n: a.tokens for n, a in answers.items()} != {n: a.tokens for n, a in alone(seed).items()}
            except (RuntimeError, IndexError, KeyError):
                noticed += 1
    assert (noticed > 0) == (name != "nothing")


def test_who_is_gone_hears_nothing_of_a_step_that_a_change_cut_short(tiny_model_dir: Path, cache_dir: Path) -> None:
    asked = [request(f"r{i}", [i + 1], 12) for i in range(3)]
    with open_ahead(tiny_model_dir, cache_dir, device_cache="100%") as engine:
        submit(engine, asked)
        answers: Answers = {}
        while len(answers) < 3 or engine._flight is None:
            collect(answers, engine.step())
        before = [len(answers[each.request_id].tokens) for each in asked]
        engine.resize("50", None)
        engine.abort("r1")
        outputs = engine.step()
        assert sorted(output.request_id for output in outputs) == ["r0", "r2"]
        collect(answers, outputs)
        finish(engine, answers)
        assert [len(answers[each.request_id].tokens) for each in asked] == [12, before[1], 12]
        assert_idle(engine)


def test_whoever_waits_is_admitted_as_soon_as_there_is_room(tiny_model_dir: Path, cache_dir: Path) -> None:
    """One that found none does not keep the others from running ahead, and comes when one of them has ended."""
    waiting = request("waits", range(2, 60), 2)
    with open_ahead(tiny_model_dir, cache_dir, device_cache="100%", kv_cache="32KiB", max_model_len=128) as engine:
        submit(engine, [request("short", [1], 9), request("long", range(64), 40)])
        answers: Answers = {}
        while engine._flight is None:
            collect(answers, engine.step())
        submit(engine, [waiting])
        ahead = 0
        while answers["short"].finish_reason is None:
            collect(answers, engine.step())
            ahead += engine._flight is not None and engine._flight.rows[0].source >= 0
        assert ahead > 5
        assert "waits" not in answers
        while "waits" not in answers:
            collect(answers, engine.step())
        assert answers["long"].finish_reason == "length"
        finish(engine, answers)
        assert_idle(engine)
