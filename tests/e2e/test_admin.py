"""Caches that change their size and tables that are replaced under a server that works."""

import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.conftest import Running
from e2e.test_lifecycle import engine_of, eventually
from tiny import tiny_config
from tolserve.model.build import build_table

Start = Callable[..., Running]
STREAMS = 8
DICE = random.Random(7)
PROMPTS = [[DICE.randrange(1, 300) for _ in range(length)] for length in (3, 30, 90, 7, 150, 12, 60, 1)]
SIZES = ["40", "100%", "24", "60%", "9KiB", "200", "30", "280", "20", "50%"]


def complete(server: Running, prompt: list[int]) -> Any:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    with server.http() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def all_at_once(server: Running) -> list[Any]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda prompt: complete(server, prompt), PROMPTS))


def assert_same(answers: list[Any], others: list[Any]) -> None:
    """Compositions of steps differ, so the last bits may; no two logits are that close in these runs."""
    for answer, other in zip(answers, others, strict=True):
        assert answer["text"] == other["text"]
        assert answer["logprobs"]["tokens"] == other["logprobs"]["tokens"]
        assert answer["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.fixture(scope="module")
def table(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "table"
    build_table(model_dir, path)
    return path


@pytest.fixture(scope="module")
def living(start_server: Start, table: Path) -> Running:
    """Its table may be replaced; tests put back what they change."""
    return start_server("--table", str(table), "--device-cache", "60", "--max-num-batched-tokens", "64").wait_ready()


@pytest.fixture(scope="module")
def undisturbed(living: Running) -> list[Any]:
    return all_at_once(living)


@contextmanager
def working(server: Running, rounds: list[list[Any]]) -> Iterator[threading.Event]:
    """Requests run, eight at a time, until the block ends; the event says that the first answers are there."""
    ending, begun = threading.Event(), threading.Event()

    def work() -> None:
        while not ending.is_set():
            rounds.append(all_at_once(server))
            begun.set()

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(work)
        try:
            yield begun
        finally:
            ending.set()
            worker.result()


def resize(client: httpx.Client, **sizes: str) -> Any:
    answer = client.post("/v1/tol/cache", json=sizes)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_tiers_change_their_size_under_load(living: Running, undisturbed: list[Any]) -> None:
    rounds: list[list[Any]] = []
    evictions = living.metric("tolserve_tol_evictions_total")
    with living.http() as client, working(living, rounds):
        for number, size in enumerate(SIZES * 2):
            eventually(lambda: living.metric("tolserve_num_requests_running") > 0, "requests run")
            sizes = (
                resize(client, device_cache=size) if number % 2 else resize(client, device_cache=size, host_cache=size)
            )
            assert living.metric('tolserve_tol_slots{tier="device"}') == sizes["device"]["slots"]
            assert living.metric('tolserve_tol_slots{tier="host"}') == sizes["host"]["slots"]
    assert living.metric("tolserve_tol_evictions_total") > evictions
    for answers in rounds:
        assert_same(answers, undisturbed)
    assert living.metric("tolserve_request_failure_total") == 0
    with living.http() as client:
        record = int(living.metric("tolserve_tol_record_bytes"))
        sizes = resize(client, device_cache="60", host_cache="0")
        assert sizes == {"device": {"slots": 60, "bytes": 60 * record}, "host": {"slots": 0, "bytes": 0}}
        assert resize(client, host_cache=f"{10 * record + 1}B")["host"] == {"slots": 10, "bytes": 10 * record}
        assert resize(client, device_cache="10%")["device"]["slots"] == 30
        assert resize(client, device_cache="60", host_cache="0") == sizes
    eventually(lambda: living.metric("tolserve_tol_slots_pinned") == 0, "nothing is held")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "device_cache", "give this, host_cache or both"),
        ({"device_cache": None}, "device_cache", "give this"),
        ({"device_cache": 64}, "device_cache", "string"),
        ({"device_cache": "64", "policy": "lru"}, "policy", "no such field"),
        ({"device_cache": "6" * 41}, "device_cache", "40 characters"),
        ({"device_cache": "lots"}, None, "'lots' is not understood"),
        ({"device_cache": "0"}, None, "at least 1"),
        ({"device_cache": "64", "host_cache": "101%"}, None, "'101%' is not understood"),
        ({"host_cache": "0.1%"}, None, "holds no record"),
        ({"host_cache": "-1"}, None, "not understood"),
        ({"host_cache": "100%"}, None, "restart to have it"),
    ],
)
def test_sizes_that_cannot_be_are_refused(living: Running, body: dict[str, Any], param: str | None, words: str) -> None:
    with living.http() as client:
        refused = client.post("/v1/tol/cache", json=body)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == param
        assert words in refused.json()["error"]["message"]
        view = client.get("/v1/tol/cache").json()
    assert view["slots"] == 60
    assert living.metric('tolserve_tol_slots{tier="host"}') == 0


def test_memory_that_is_not_there_changes_nothing(living: Running, undisturbed: list[Any]) -> None:
    engine = engine_of(living)
    unlimited = resource.prlimit(engine, resource.RLIMIT_AS)
    with living.http() as client:
        resource.prlimit(engine, resource.RLIMIT_AS, (1 << 20, unlimited[1]))  # no page more than it has
        try:
            refused = client.post("/v1/tol/cache", json={"host_cache": "90%"})
        finally:
            resource.prlimit(engine, resource.RLIMIT_AS, unlimited)
        assert refused.status_code == 507, refused.text
        assert refused.json()["error"]["code"] == "out_of_memory"
        assert "do not fit" in refused.json()["error"]["message"]
        assert client.get("/v1/tol/cache").json()["slots"] == 60
    assert living.metric('tolserve_tol_slots{tier="host"}') == 0
    assert engine_of(living) == engine
    assert_same(all_at_once(living), undisturbed)


def test_a_replaced_table_is_reopened_under_load(
    living: Running, undisturbed: list[Any], table: Path, model_dir: Path
) -> None:
    rounds: list[list[Any]] = []
    with living.http() as client, working(living, rounds) as begun:
        begun.wait(60)
        build_table(model_dir, table, force=True)
        eventually(lambda: living.metric("tolserve_tol_table_changed") == 1, "the change is noticed", 20)
        facts = client.post("/v1/tol/table/reopen", json={}).json()
        assert facts["fingerprint"] in table.joinpath("manifest.json").read_text()
        assert (facts["vocab_size"], facts["num_layers"]) == (300, 2)
        assert str(table) not in str(facts)
        assert living.metric("tolserve_tol_table_changed") == 0
        assert client.post("/v1/tol/table/reopen").status_code == 200
    assert_same(all_at_once(living), undisturbed)
    for answers in rounds:
        assert_same(answers, undisturbed)
    assert living.metric('tolserve_tol_slots{tier="device"}') == 60
    assert "was changed (replaced)" in living.log.read_text()


def test_what_is_no_version_of_the_table_is_not_opened(
    living: Running, undisturbed: list[Any], table: Path, tmp_path: Path, model_dir_of: Callable[..., Path]
) -> None:
    away = table.rename(tmp_path / "away")
    other = model_dir_of(tiny_config(max_position_embeddings=512, intermediate_size=64))
    with living.http() as client:
        try:
            for words in ("no manifest", "other weights", "truncated|length|bytes"):
                if words == "other weights":
                    build_table(other, table)
                elif words != "no manifest":
                    shutil.rmtree(table)
                    shutil.copytree(away, table)
                    with next(table.glob("records-*")).open("r+b") as file:
                        file.truncate(5000)
                refused = client.post("/v1/tol/table/reopen", json={})
                assert refused.status_code == 409, refused.text
                error = refused.json()["error"]
                assert error["code"] == "table_conflict"
                assert str(table) not in error["message"]
                assert any(word in error["message"] for word in words.split("|")), error["message"]
                assert_same([complete(living, PROMPTS[0])], undisturbed[:1])
        finally:
            shutil.rmtree(table, ignore_errors=True)
            away.rename(table)
        assert client.post("/v1/tol/table/reopen", json={"table": "/etc"}).status_code == 400
        assert client.post("/v1/tol/table/reopen", json={}).status_code == 200
    assert_same(all_at_once(living), undisturbed)


@pytest.mark.parametrize(("path", "body"), [("/v1/tol/cache", {"device_cache": "9"}), ("/v1/tol/table/reopen", {})])
def test_only_holders_of_the_key_change_a_server(living: Running, path: str, body: dict[str, str]) -> None:
    with living.http() as client:
        assert client.post(path, json=body, headers={"authorization": "Bearer guess"}).status_code == 401
        assert client.post(path, json=body, headers={"authorization": ""}).status_code == 401
