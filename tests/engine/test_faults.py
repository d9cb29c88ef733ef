"""Records that cannot be read: whoever needs one is told, everyone else is served, and nothing wrong is said."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.driver import Answers, OpenEngine, assert_idle, request, serve
from engine.test_engine import prompt_of, tokens_told, told_by
from tol.tables import flip_byte, shard_file, value
from tolserve.engine.engine import Engine
from tolserve.engine.request import Request
from tolserve.model.build import build_table
from tolserve.tol.table import Table

BAD = 250  # in no prompt but the victims', and (asserted) in no answer


@pytest.fixture(scope="module")
def whole_table(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "tol"
    build_table(tiny_model_dir, path)
    return path


def bystanders() -> list[Request]:
    prompts = [[t for t in prompt_of(20 + i, 70 + i) if t < BAD - 50] for i in range(4)]
    return [request(f"fine{i}", prompt, 6, logprobs=1) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def right(engine_of: OpenEngine) -> Answers:
    """What the bystanders get from an intact table, one at a time."""
    answers: Answers = {}
    with engine_of(device_cache="100%") as engine:
        for each in bystanders():
            answers |= serve(engine, [each])
    return answers


@pytest.fixture
def damaged(engine_of: OpenEngine, whole_table: Path, tmp_path: Path) -> Iterator[tuple[Engine, Table]]:
    """An engine over a table that the test may damage under it; nothing is cached yet."""
    path = shutil.copytree(whole_table, tmp_path / "tol")
    with engine_of(table=str(path), device_cache="24", max_num_batched_tokens=16) as engine:
        yield engine, Table.open(path)


@contextmanager
def only_victims_fail(engine: Engine, right: Answers, victims: list[Request], kind: str) -> Iterator[Answers]:
    requests = [victims[0], *bystanders(), *victims[1:]]
    answers = serve(engine, requests)
    for victim in victims:
        failure = answers[victim.request_id].failure
        assert failure is not None
        assert failure.kind == "table"
        assert f"record of token {BAD}" in failure.message
    for name, answer in right.items():
        assert answers[name].failure is None
        assert answers[name].tokens == answer.tokens
        assert BAD not in answer.tokens
    yield answers
    assert value(engine.registry, "tol_read_errors_total", kind) > 0
    assert value(engine.registry, "request_failure_total", "table") == len(victims)
    assert value(engine.registry, "request_success_total") == len(right)
    assert_idle(engine)


def test_a_corrupt_record_fails_those_who_need_it(damaged: tuple[Engine, Table], right: Answers) -> None:
    engine, table = damaged
    flip_byte(table, BAD)
    early = request("early", [3, BAD, 5])
    late = request("late", [*range(60), BAD], 4)  # its record is prefetched in a later chunk
    with only_victims_fail(engine, right, [early, late], "checksum") as answers:
        assert answers["early"].tokens == answers["late"].tokens == []
    flip_byte(table, BAD)
    assert serve(engine, [early])["early"].failure is None, "once it can be read again it serves again"
    assert_idle(engine)


def test_each_is_told_of_a_record_that_it_needed_now(damaged: tuple[Engine, Table]) -> None:
    engine, table = damaged
    flip_byte(table, BAD)
    flip_byte(table, BAD + 1)
    answers = serve(engine, [request("one", [BAD]), request("both", [BAD + 1, *range(40), BAD])])
    for name, bad in (("one", BAD), ("both", BAD + 1)):
        failure = answers[name].failure
        assert failure is not None
        assert f"record of token {bad}:" in failure.message
    assert_idle(engine)


def test_a_file_that_was_cut_off_fails_those_beyond_its_end(damaged: tuple[Engine, Table], right: Answers) -> None:
    engine, table = damaged
    path, offset = shard_file(table, BAD)
    os.truncate(path, offset)
    with only_victims_fail(engine, right, [request("cut", [BAD, 1])], "short"):
        pass


def test_a_record_that_fails_amid_an_answer_ends_it_there(
    engine_of: OpenEngine, damaged: tuple[Engine, Table], right: Answers
) -> None:
    """Up to the token whose record is bad the answer is right, that token included: only what follows needs it."""
    engine, table = damaged
    with engine_of(device_cache="100%") as intact:
        victim = request("victim", prompt_of(20, 71), 12)
        whole = serve(intact, [victim])["victim"].tokens
    known = {
        *victim.prompt,
        *(t for r in bystanders() for t in r.prompt),
        *(t for a in right.values() for t in a.tokens),
    }
    place, bad = next((i, token) for i, token in enumerate(whole[:-1]) if token not in known)
    flip_byte(table, bad)
    answers = serve(engine, [victim, *bystanders()])
    failed = answers["victim"]
    assert failed.failure is not None
    assert f"record of token {bad}:" in failed.failure.message
    assert failed.tokens == whole[: place + 1]
    assert {name: answers[name].tokens for name in right} == {name: answer.tokens for name, answer in right.items()}
    assert_idle(engine)


def test_the_policy_hears_of_a_failed_steps_tokens_once(damaged: tuple[Engine, Table]) -> None:
    engine, table = damaged
    flip_byte(table, BAD)
    told = told_by(engine)
    fine = bystanders()[0]
    answers = serve(engine, [request("victim", [7, BAD]), fine])
    assert answers["victim"].failure is not None
    assert tokens_told(told, fine.request_id) == [*fine.prompt, *answers[fine.request_id].tokens[:-1]]
