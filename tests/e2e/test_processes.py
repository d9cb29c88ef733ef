"""Starting, failing to start, and dying."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from e2e.conftest import Running, environment, tolserve


def engine_of(server: Running) -> int:
    """The engine's process id: the server's only child."""
    (child,) = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(child)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the engine in /proc")
def test_a_dead_engine_fails_its_clients_and_leaves_metrics(start_server: Callable[..., Running]) -> None:
    server = start_server().wait_ready()
    stream = server.openai().completions.create(
        model="tiny", prompt=["a"] * 8, n=16, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    os.kill(engine_of(server), signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine process ended"):
        list(stream)
    with server.http() as client:
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        assert "tolserve_engine_up 0.0" in client.get("/metrics").text
    with pytest.raises(openai.InternalServerError) as raised:
        server.openai().completions.create(model="tiny", prompt="a")
    assert raised.value.status_code == 503


def test_a_server_whose_engine_cannot_start_ends_with_one_line(
    model_dir: Path, start_server: Callable[..., Running], tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    (broken / "model.safetensors").write_bytes(b"nonsense")
    argv = tolserve("serve", str(broken), "--port", "0", "--cache-dir", str(tmp_path / "cache"))
    ended = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=110)
    assert ended.returncode == 1
    assert "model.safetensors" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_stopped_server_takes_its_engine_along(start_server: Callable[..., Running]) -> None:
    server = start_server().wait_ready()
    engine = engine_of(server)
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{engine}").exists():
        assert time.monotonic() < deadline, "the engine still runs"
        time.sleep(0.05)


def test_generate(model_dir: Path, tmp_path: Path) -> None:
    options = ["-p", "The old house", "--max-tokens", "5", "--seed", "1", "--cache-dir", str(tmp_path), "--json"]
    argv = tolserve("generate", str(model_dir), *options)
    ended = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["prompt"] == "The old house"
    assert answer["usage"]["completion_tokens"] <= 5
