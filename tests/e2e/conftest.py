"""Real servers as processes, on a tiny random model."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tiny import tiny_config
from tolserve.model.config import ModelConfig

ROOT = Path(__file__).parents[2]
CONTEXT = 512
KEY = "test-key"
START_SECONDS = 90.0  # torch alone takes 2 s to import on a quiet machine; shared ones stall


@dataclass
class Running:
    """A server process that has been told to start."""

    process: subprocess.Popen[str]
    url: str
    log: Path  # its standard error
    temporary: Path  # its folder for temporary files

    def http(self) -> httpx.Client:
        # There is no TLS here, and loading certificates takes longer than a request.
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60, verify=False)

    def openai(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def wait_ready(self) -> "Running":
        deadline = time.monotonic() + START_SECONDS
        with self.http() as client:
            while time.monotonic() < deadline and self.process.poll() is None:
                try:
                    if client.get("/ready").status_code == 200:
                        return self
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise RuntimeError(f"the server is not ready; exit status {self.process.poll()}\n{self.log.read_text()}")

    def metric(self, name: str) -> float:
        """Sum over all series of a metric."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{"))]
        assert values, f"no metric {name}"
        return sum(values)


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT / "server"), str(ROOT / "kernels")))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def tolserve(*argv: str) -> list[str]:
    return [sys.executable, "-m", "tolserve", *argv]


@pytest.fixture(scope="session")
def model_dir(model_dir_of: Callable[[ModelConfig], Path]) -> Path:
    return model_dir_of(tiny_config(max_position_embeddings=CONTEXT))


@pytest.fixture(scope="session")
def start_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """`start_server(*options, model=...)`: a server on a free port, stopped at the end of the session."""
    started: list[Running] = []
    cache = tmp_path_factory.mktemp("cache")

    def start(*options: str, model: Path = model_dir) -> Running:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fixed = ["--port", str(port), "--cache-dir", str(cache), "--served-model-name", "tiny", "--api-key", KEY]
        argv = tolserve("serve", str(model), *fixed, *options)
        folder = tmp_path_factory.mktemp("server")
        log, temporary = folder / "log", folder / "tmp"
        temporary.mkdir()
        with log.open("w") as stderr:
            process = subprocess.Popen(argv, env=environment() | {"TMPDIR": str(temporary)}, stderr=stderr, text=True)
        running = Running(process, f"http://127.0.0.1:{port}", log, temporary)
        started.append(running)
        return running

    yield start
    for running in started:
        running.process.terminate()
    for running in started:
        running.process.wait(30)


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Running]) -> Running:
    """Shared by the tests that leave it as they found it: a cache of a fifth of the vocabulary, a short queue."""
    return start_server("--device-cache", "60", "--max-num-seqs", "16", "--max-queue", "20").wait_ready()


@pytest.fixture(scope="session")
def client(server: Running) -> OpenAI:
    return server.openai()
