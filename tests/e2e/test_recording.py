"""A server that remembers: a warm restart from its own counts, a trace of what it ran, and what neither may be."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from e2e.conftest import Running
from e2e.test_lifecycle import engine_of, eventually
from tolserve.tol.frequencies import read_frequencies
from tolserve.tol.replay import Trace

VOCAB = 300
PROMPTS = [[3, 4, 5, 3, 7], [100, 101, 3, 4], [3, 3, 200]]
Start = Callable[..., Running]


def complete(server: Running, prompt: list[int], max_tokens: int = 6) -> dict[str, Any]:
    with server.http() as client:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    return dict(answer.json())


def stop(server: Running) -> None:
    server.process.terminate()
    assert server.process.wait(60) == 0


def preloaded(server: Running) -> float:
    with server.http() as client:
        lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("tolserve_tol_fills_total{") and 'cause="preload"' in line]
    assert found
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def test_a_restart_is_warm(start_server: Start, tmp_path: Path) -> None:
    file = tmp_path / "counts.npz"
    options = ["--tol-frequencies", str(file), "--tol-save-frequencies", str(file), "--device-cache", "24"]
    cold = start_server(*options).wait_ready()
    assert preloaded(cold) == 0
    first = complete(cold, PROMPTS[0])
    for prompt in PROMPTS[1:]:
        complete(cold, prompt)
    lookups = cold.metric("tolserve_tol_lookups_total")
    stop(cold)
    counts = read_frequencies(file, VOCAB)
    assert counts.sum() == sum(map(len, PROMPTS)) + 3 * 5, "each token that runs counts once; the last one does not run"
    assert counts.sum() >= lookups
    assert counts[3] >= 5
    warm = start_server(*options).wait_ready()
    assert preloaded(warm) == min(24, np.count_nonzero(counts))
    again = complete(warm, PROMPTS[0])
    assert again["choices"] == first["choices"]
    rate, cold_rate = (usage["hits"] / usage["lookups"] for usage in (again["usage"]["tol"], first["usage"]["tol"]))
    assert rate == 1.0 > cold_rate
    engine = engine_of(warm)
    os.kill(engine, signal.SIGKILL)  # the next engine is warm as well
    eventually(lambda: warm.metric("tolserve_engine_up") == 0, "the engine is gone")
    warm.wait_ready()
    assert complete(warm, PROMPTS[0])["usage"]["tol"]["hits"] > first["usage"]["tol"]["hits"]
    stop(warm)


def test_a_trace_holds_what_ran_and_nothing_else(start_server: Start, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    part = tmp_path / "trace.npz.part"
    server = start_server("--tol-trace", str(path)).wait_ready()
    answers = [complete(server, prompt) for prompt in PROMPTS[:2]]
    eventually(lambda: part.stat().st_size == 8 + 4 * (9 + 10 + 2), "both are in the file")
    os.kill(engine_of(server), signal.SIGKILL)
    eventually(lambda: server.metric("tolserve_engine_up") == 0, "the engine is gone")
    server.wait_ready()  # it goes on with the same file
    answers.append(complete(server, PROMPTS[2]))
    stop(server)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    assert path.stat().st_mode & 0o777 == 0o600
    with np.load(path) as file:
        assert set(file.files) == {"tokens", "offsets", "vocab_size"}
    trace = Trace.load(path)
    assert trace.vocab_size == VOCAB
    for number, prompt in enumerate(PROMPTS):
        tokens = trace.documents([number]).tokens.tolist()
        assert tokens[: len(prompt)] == prompt
        assert len(tokens) == len(prompt) + 5 == answers[number]["usage"]["total_tokens"] - 1
    refused = start_server("--tol-trace", str(path))
    assert refused.process.wait(90) != 0
    assert "exists and is not overwritten" in refused.log.read_text()


@pytest.mark.parametrize("option", ["--tol-save-frequencies", "--tol-trace"])
def test_a_path_that_cannot_be_written_ends_the_start(start_server: Start, tmp_path: Path, option: str) -> None:
    server = start_server(option, str(tmp_path / "nowhere" / "file.npz"))
    assert server.process.wait(90) != 0
    assert f"{tmp_path / 'nowhere' / 'file.npz'}: [Errno 2]" in server.log.read_text()
    assert not list(tmp_path.iterdir())
