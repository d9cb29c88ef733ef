"""Engines that die or hang, servers that stop, clients that leave: what each one sees, and that nothing is left."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import Stream
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families

from e2e.conftest import KEY, Running, environment, tolserve
from tolserve.engine.child import SILENCE_SECONDS
from tolserve.model.build import build_table

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")

SECRET = "zebras"  # in every prompt here, and in no log
LONG = {"prompt": [SECRET] * 4, "n": 16, "max_tokens": 480, "extra_body": {"ignore_eos": True}}
PATIENCE = 60.0  # seconds for what takes two on a quiet machine


def eventually(is_so: Callable[[], bool], what: str, seconds: float = PATIENCE) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


def engine_of(server: Running) -> int:
    """The engine's process id: the server's only child."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    eventually(lambda: bool(children.read_text().split()), "an engine process")
    (child,) = children.read_text().split()
    return int(child)


def is_gone(pid: int) -> bool:
    """Ended, and waited for by whoever inherited it."""
    return not Path(f"/proc/{pid}").exists()


def left_behind(server: Running) -> list[Path]:
    return list(server.temporary.glob("tolserve-*"))


def stream(server: Running, **changes: Any) -> Stream[Completion]:
    return server.openai().completions.create(model="tiny", stream=True, **(LONG | changes))


def status(server: Running, path: str) -> int:
    with server.http() as client:
        return client.get(path).status_code


def complete(server: Running, **headers: str) -> httpx.Response:
    with server.http() as client:
        body = {"model": "tiny", "prompt": SECRET, "max_tokens": 2}
        return client.post("/v1/completions", json=body, headers=headers)


def values(server: Running) -> dict[tuple[str, ...], float]:
    """Every series that may only grow."""
    with server.http() as client:
        text = client.get("/metrics").text
    return {
        (sample.name, *sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        if family.type in ("counter", "histogram")
        for sample in family.samples
    }


@contextmanager
def watched_counters(server: Running) -> Iterator[list[dict[tuple[str, ...], float]]]:
    """Scrapes all the time, and checks in the end that nothing ever fell or vanished."""
    scrapes = [values(server)]
    done = threading.Event()

    def scrape() -> None:
        while not done.wait(0.05):
            scrapes.append(values(server))

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield scrapes
    finally:
        done.set()
        thread.join()
    for earlier, later in pairwise(scrapes):
        fallen = {name: (value, later.get(name)) for name, value in earlier.items() if later.get(name, -1.0) < value}
        assert not fallen


@pytest.fixture(scope="module")
def crashing(start_server: Callable[..., Running]) -> Running:
    return start_server("--log-format", "json")


@pytest.mark.parametrize(
    ("fault", "reason", "message"),
    [(signal.SIGKILL, "exit", "the engine process ended: killed by SIGKILL"), (signal.SIGSTOP, "hang", "hung")],
)
def test_an_engine_that_dies_or_hangs_is_replaced(
    crashing: Running, fault: signal.Signals, reason: str, message: str
) -> None:
    server = crashing.wait_ready()
    engine = engine_of(server)
    with watched_counters(server) as scrapes:
        assert complete(server).status_code == 200
        running = stream(server)
        next(iter(running))
        values(server)  # what was counted since the last snapshot is lost with an engine that is killed
        os.kill(engine, fault)
        # 4 s of silence, and what a busy machine adds; benchmarks/crashes.py measures it.
        assert eventually(lambda: status(server, "/health") == 503, "/health turns 503", 20) < 8
        with pytest.raises(openai.APIError, match=message):
            list(running)
        refused = complete(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert "restarted" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert server.metric("tolserve_engine_up") == 0
        assert server.metric("tolserve_num_requests_running") == 0
        if fault == signal.SIGKILL:  # the next one dies while it loads
            second = engine_of(server)
            os.kill(second, fault)
            eventually(lambda: is_gone(second), "the second engine is gone")
            assert "killed by SIGKILL; it is being restarted; unless somebody killed it" in server.log.read_text()
            assert status(server, "/health") == 503
        server.wait_ready()
        assert status(server, "/health") == 200
        assert complete(server).status_code == 200
        assert server.metric("tolserve_engine_up") == 1
    assert is_gone(engine)
    name = ("tolserve_engine_restarts_total", ("reason", reason))
    assert scrapes[-1][name] == scrapes[0][name] + (2 if fault == signal.SIGKILL else 1)
    assert values(server)[("tolserve_request_success_total", ("finished_reason", "length"))] >= 2
    assert not left_behind(server)


def test_every_log_line_is_json_and_says_which_request_but_not_what_it_said(crashing: Running) -> None:
    server = crashing.wait_ready()
    complete(server, **{"x-request-id": "my-id.1"})
    with server.http() as client:
        client.get("/v1/models/tiny", params={"text": SECRET})
        client.get(f"/nowhere/{SECRET}")
    eventually(lambda: '"status": 404' in server.log.read_text(), "the last line is written")  # after its answer
    text = server.log.read_text()
    assert SECRET not in text
    assert KEY not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["process"] for line in lines} == {"api", "engine"}
    for line in lines:
        assert {"time", "level", "logger", "message"} <= set(line)
    access = [line for line in lines if line["logger"] == "tolserve.access"]
    (mine,) = [line for line in access if line["request_id"] == "my-id.1"]
    assert (mine["route"], mine["method"], mine["status"]) == ("/v1/completions", "POST", 200)
    assert mine["completion_tokens"] == 2
    assert 0 < mine["seconds"] < PATIENCE
    assert not {"/health", "/ready", "/metrics"} & {line["route"] for line in access}
    assert [line["status"] for line in access if line["route"] == "other"] == [404]


def test_a_server_that_is_killed_leaves_nothing(start_server: Callable[..., Running]) -> None:
    """Not even an engine that cannot act itself."""
    server = start_server().wait_ready()
    engine = engine_of(server)
    running = stream(server)
    next(iter(running))
    os.kill(engine, signal.SIGSTOP)
    server.process.kill()
    server.process.wait()
    eventually(lambda: is_gone(engine), "the engine is gone")
    assert not left_behind(server)


def test_sigterm_lets_what_runs_finish(start_server: Callable[..., Running]) -> None:
    server = start_server("--shutdown-timeout", "60").wait_ready()
    engine = engine_of(server)
    running = stream(server, prompt=SECRET, n=2)
    next(iter(running))
    os.kill(engine, signal.SIGTERM)  # service managers and terminals signal all processes at once
    os.kill(engine, signal.SIGINT)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: status(server, "/ready") == 503, "/ready turns 503")
    refused = complete(server)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    assert refused.headers["retry-after"]
    assert refused.headers["connection"] == "close"
    assert status(server, "/health") == 200
    finished = []
    for chunk in running:
        for choice in chunk.choices:
            finished += [choice.index] if choice.finish_reason == "length" else []
    assert sorted(finished) == [0, 1]
    assert server.process.wait(PATIENCE) == 0
    assert is_gone(engine)
    assert not left_behind(server)


def begun_upload(server: Running) -> socket.socket:
    """A request whose body never comes."""
    url = httpx.URL(server.url)
    upload = socket.create_connection((url.host, url.port), timeout=PATIENCE)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 9\r\n\r\n"
    upload.sendall(head.encode())
    return upload


def test_what_runs_past_the_deadline_is_told_so(start_server: Callable[..., Running]) -> None:
    server = start_server("--shutdown-timeout", "0.5").wait_ready()
    running = stream(server)
    next(iter(running))
    queued: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: queued.append(complete(server)))
    waiting = server.metric("tolserve_num_requests_waiting")
    thread.start()
    eventually(lambda: server.metric("tolserve_num_requests_waiting") > waiting, "the other request is queued")
    upload = begun_upload(server)
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="stopped before the answer was complete"):
        list(running)
    thread.join(PATIENCE)
    assert (queued[0].status_code, queued[0].json()["error"]["code"]) == (503, "stopping")
    answer = b"".join(iter(lambda: upload.recv(10_000), b""))
    assert b" 503 " in answer
    assert b'"stopping"' in answer
    upload.close()
    assert server.process.wait(PATIENCE) == 0


def test_a_second_signal_ends_it_at_once(start_server: Callable[..., Running]) -> None:
    """Even when the engine cannot act."""
    server = start_server().wait_ready()
    engine = engine_of(server)
    running = stream(server)
    next(iter(running))
    os.kill(engine, signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: status(server, "/ready") == 503, "/ready turns 503")
    server.process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert server.process.wait(PATIENCE) == 128 + signal.SIGINT
    assert time.monotonic() - began < 2
    eventually(lambda: is_gone(engine), "the engine is gone")
    assert not left_behind(server)


def test_a_machine_that_stood_still_is_no_hang(slow: Running) -> None:
    server = slow.wait_ready()
    pids = (server.process.pid, engine_of(server))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(SILENCE_SECONDS + 1)
    os.kill(pids[0], signal.SIGCONT)
    time.sleep(1)  # the engine comes later, as it may on a busy machine
    os.kill(pids[1], signal.SIGCONT)
    assert complete(server).status_code == 200
    assert server.metric("tolserve_engine_restarts_total") == 0


@pytest.fixture(scope="module")
def slow(start_server: Callable[..., Running]) -> Running:
    """One sequence at a time, four tokens of a prompt in a step: each state of a request lasts."""
    return start_server("--max-num-seqs", "1", "--max-num-batched-tokens", "4")


def is_idle(server: Running) -> bool:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "tol_slots_pinned")
    return all(server.metric(f"tolserve_{name}") == 0 for name in names)


@contextmanager
def asked(server: Running, **changes: Any) -> Iterator[httpx.Client]:
    """A client in the middle of a request that is not streamed; gone when the block ends."""
    client = server.http()
    body = {"model": "tiny", "prompt": SECRET, "max_tokens": 480, "ignore_eos": True, **changes}

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            client.post("/v1/completions", json=body)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield client
    finally:
        close_sockets(client)
        thread.join()


def close_sockets(client: httpx.Client) -> None:
    for connection in client._transport._pool.connections:  # type: ignore[attr-defined]
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(2)


def test_a_client_that_leaves_the_queue(slow: Running) -> None:
    server = slow.wait_ready()
    blocker = stream(server, prompt=SECRET)
    next(iter(blocker))
    waiting = server.metric("tolserve_num_requests_waiting")
    with asked(server, n=16):
        eventually(lambda: server.metric("tolserve_num_requests_waiting") > waiting, "the second one waits")
    eventually(lambda: server.metric("tolserve_num_requests_waiting") <= waiting, "it waits no more", 10)
    assert server.metric("tolserve_num_requests_running") == 1
    blocker.close()
    eventually(lambda: is_idle(server), "everything is given back")


def test_a_client_that_leaves_in_prefill(slow: Running) -> None:
    server = slow.wait_ready()
    prompts = [[index % 250 + 1 for index in range(510)]] * 8
    before = server.metric("tolserve_prompt_tokens_total")
    with asked(server, prompt=prompts, max_tokens=1):
        eventually(lambda: server.metric("tolserve_num_requests_running") == 1, "the first prompt is read")
    eventually(lambda: is_idle(server), "everything is given back")
    assert server.metric("tolserve_prompt_tokens_total") < before + 8 * 510


def test_a_client_that_leaves_its_stream(slow: Running) -> None:
    server = slow.wait_ready()
    generated = server.metric("tolserve_generation_tokens_total")
    leaving = stream(server, prompt=SECRET, n=8)
    next(iter(leaving))
    leaving.close()
    eventually(lambda: is_idle(server), "everything is given back")
    assert server.metric("tolserve_generation_tokens_total") < generated + 8 * 480


def test_a_failed_request_carries_its_id_in_both_logs(
    model_dir: Path, start_server: Callable[..., Running], tmp_path: Path
) -> None:
    table = tmp_path / "table"
    build_table(model_dir, table)
    (records,) = table.glob("records-*.safetensors")
    whole = records.read_bytes()
    records.write_bytes(whole[:4096] + bytes(len(whole) - 4096))  # the headers stay
    server = start_server("--table", str(table), "--log-format", "json").wait_ready()
    answer = complete(server, **{"x-request-id": "broken-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "table_error")

    def mine() -> set[tuple[str, str]]:
        lines = [json.loads(line) for line in server.log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return {(line["process"], line["level"]) for line in lines if line.get("request_id") == "broken-1"}

    eventually(lambda: mine() == {("api", "info"), ("engine", "warning")}, "both logs have it")


def test_a_crash_of_the_engine_is_one_json_line() -> None:
    told = {"parent": os.getpid(), "log_format": "json", "log_level": "info", "address": "ipc:///nonexistent/x"}
    ended = subprocess.run(
        [*tolserve()[:1], "-m", "tolserve.engine.boot"],
        input=json.dumps(told | {"pulse": "ipc:///nonexistent/y"}) + "\n",
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ended.returncode == 1
    (line,) = [json.loads(line) for line in ended.stderr.splitlines()]
    assert (line["process"], line["level"]) == ("engine", "critical")
    assert line["exception"].startswith("Traceback")
    assert "ZMQError" in line["exception"]
