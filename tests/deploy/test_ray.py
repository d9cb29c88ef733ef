"""deploy/ray on a real Ray: two replicas, streams, a client that leaves, a dead engine, a dead replica."""

import asyncio
import importlib
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_cluster import SHIPPED, Cluster, own_network, ray_serve, replicas_here, shipped_config

from tiny import tiny_config
from tolserve.model.config import ModelConfig

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Ray listens on every interface; hiding it in a namespace needs root"),
    pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed"),
]

KEY = "test-key"
# At a millisecond or a few a step a long answer takes seconds: more than a scrape, and more than the 1.4 to 4.1 s that
# it took here to find out who runs what and to kill a replica.
CONTEXT = 1536
MODEL = tiny_config(hidden_size=256, num_hidden_layers=8, max_position_embeddings=CONTEXT)
HEADERS = {"authorization": f"Bearer {KEY}"}
LONG = {"prompt": "The old house", "max_tokens": CONTEXT - 100, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def cluster(model_dir_of: Callable[[ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The shipped configuration with a tiny model, one replica at first, and quick decisions."""
    config = shipped_config()
    (application,) = config["applications"]
    application["args"] |= {
        "model": str(model_dir_of(MODEL)),
        "cache-dir": str(tmp_path_factory.mktemp("cache")),
        "served-model-name": "tiny",
        "api-key": KEY,
        "threads": 1,
    }
    (deployment,) = application["deployments"]
    scaling = {"max_replicas": 2, "target_ongoing_requests": 8, "upscale_delay_s": 1}
    deployment["autoscaling_config"] |= scaling | {"metrics_interval_s": 1, "look_back_period_s": 2}
    with own_network(), ray_serve(config, HEADERS) as running:
        running.wait_for(1)
        yield running


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
@pytest.mark.parametrize(
    "args", [{"port": 1}, {"shutdown-timeout": 5}, {"no-such-option": 1}, {"device-cache": "lots"}]
)
def test_an_option_is_honoured_or_refused(args: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SHIPPED.parent)
    build = importlib.import_module("tolserve_ray").build
    (name,) = args
    with pytest.raises(ValueError, match=name.replace("-", "_")):
        build(args)


def completion(client: httpx.Client | httpx.AsyncClient, **fields: Any) -> Any:
    """A completion, or a coroutine of it; greedy and short unless told otherwise."""
    body = {"model": "tiny", "prompt": "The old house", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return client.post("/v1/completions", json=body | fields)


def async_client(cluster: Cluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, headers=HEADERS, timeout=60)


async def short_requests(cluster: Cluster, count: int, **fields: Any) -> list[httpx.Response]:
    async with async_client(cluster) as client:
        asked = (completion(client, prompt=f"House {number}", **fields) for number in range(count))
        return list(await asyncio.gather(*asked))


async def stream(client: httpx.AsyncClient, started: asyncio.Event | None = None, **fields: Any) -> str:
    """The text of a whole stream. Raises httpx.HTTPError or RuntimeError for one that does not reach its end."""
    text, last = "", ""
    async with client.stream("POST", "/v1/completions", json={"model": "tiny", "temperature": 0} | fields) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not (last := line or last).startswith("data: {") or not line:
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text += "".join(choice["text"] for choice in event["choices"])
            if started is not None:
                started.set()
    if last != "data: [DONE]":
        raise RuntimeError("the stream broke off")
    return text


def running(cluster: Cluster) -> dict[str, float]:
    return cluster.by_replica("tolserve_num_requests_running")


def eventually(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def two(cluster: Cluster) -> Cluster:
    """The cluster once load has brought a second replica; the shipped configuration keeps it for ten minutes."""

    def grown() -> bool:
        answers = asyncio.run(short_requests(cluster, 40, max_tokens=60))
        assert {answer.status_code for answer in answers} == {200}
        return len(cluster.by_replica("tolserve_engine_up")) == 2

    eventually(grown, seconds=90)
    return cluster


def test_both_replicas_answer_and_one_scrape_shows_both(two: Cluster) -> None:
    def counted() -> dict[str, float]:
        return two.by_replica("tolserve_generation_tokens_total")

    before = counted()
    answers: list[httpx.Response] = []

    def both_gained() -> bool:  # the proxy may hear of the second replica a moment after the first
        answers.extend(asyncio.run(short_requests(two, 40)))
        now = counted()
        return all(now[replica] > before[replica] for replica in before)

    eventually(both_gained)
    assert len(before) == 2
    assert {answer.status_code for answer in answers} == {200}
    used = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    eventually(lambda: sum(counted().values()) - sum(before.values()) == used, seconds=5)


def test_the_servers_own_answers_come_through(cluster: Cluster) -> None:
    with cluster.client() as client:
        answer = completion(client, n=99)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "n"
        assert len(answer.headers.get_list("x-request-id")) == 1
        named = client.get("/v1/models", headers={"x-request-id": "mine"})
        assert named.headers.get_list("x-request-id") == ["mine"]
        assert client.get("/ready", headers={"authorization": ""}).status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401


def test_a_stream_comes_piece_by_piece_and_equals_the_answer(cluster: Cluster) -> None:
    body = {"model": "tiny", "temperature": 0} | LONG | {"max_tokens": 150}
    times, text = [], ""
    with cluster.client() as client:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
                    text += json.loads(line[6:])["choices"][0]["text"]
        whole = completion(client, max_tokens=150).json()["choices"][0]["text"]
    assert text == whole
    # In one piece it would take no time from the first byte to the last.
    assert times[len(times) // 2] - times[0] > 0.05
    assert times[-1] - times[len(times) // 2] > 0.05


def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    tokens = sum(cluster.by_replica("tolserve_generation_tokens_total").values())
    with cluster.client() as client, client.stream("POST", "/v1/completions", json={"model": "tiny"} | LONG) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # held, since httpx closes the stream of an iterator that is gone
        next(lines)
        eventually(lambda: sum(running(cluster).values()) == 1, seconds=3)
    eventually(lambda: sum(running(cluster).values()) == 0, seconds=5)
    assert sum(cluster.by_replica("tolserve_generation_tokens_total").values()) - tokens < LONG["max_tokens"]


def test_a_dead_engine_fails_no_request_that_came_after_it(two: Cluster) -> None:
    replica, engine = next(iter(replicas_here().items()))
    os.kill(engine, signal.SIGKILL)
    eventually(lambda: 0 in two.by_replica("tolserve_engine_up").values(), seconds=5)
    answers = asyncio.run(short_requests(two, 24))
    assert [answer.status_code for answer in answers] == [200] * 24
    two.wait_for(2)
    assert replica in replicas_here(), "Ray replaced a replica whose engine was to come back"


async def long_and_short_requests(two: Cluster, kill: Callable[[], None]) -> tuple[list[Any], list[int]]:
    """What eight long streams ended with, and the status of each short request that ran beside them."""
    short: list[int] = []
    events = [asyncio.Event() for _ in range(8)]

    async def loop(client: httpx.AsyncClient, until: asyncio.Event) -> None:
        while not until.is_set():
            short.append((await completion(client)).status_code)

    async with async_client(two) as client:
        done = asyncio.Event()
        streams = [asyncio.create_task(stream(client, event, **LONG)) for event in events]
        await asyncio.gather(*(event.wait() for event in events))
        await asyncio.to_thread(kill)
        loops = [asyncio.create_task(loop(client, done)) for _ in range(3)]
        outcomes = await asyncio.gather(*streams, return_exceptions=True)
        done.set()
        await asyncio.gather(*loops)
    return outcomes, short


def test_a_dead_replica_fails_its_own_requests_alone_and_is_replaced(two: Cluster) -> None:
    old = two.wait_for(2)
    had: dict[str, float] = {}

    def kill() -> None:
        eventually(lambda: sum(running(two).values()) == 8, seconds=3)
        had.update(running(two))
        replica, engine = next(iter(replicas_here().items()))
        os.kill(replica, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{engine}").exists(), seconds=5)

    outcomes, short = asyncio.run(long_and_short_requests(two, kill))
    whole = [outcome for outcome in outcomes if isinstance(outcome, str)]
    now = two.wait_for(2)
    (dead,) = old - now
    assert sum(had.values()) == 8
    assert 0 < had[dead] < 8
    assert len(outcomes) - len(whole) == had[dead]
    assert len(set(whole)) == 1
    assert len(short) > 3
    assert set(short) == {200}
