"""The supervision in a process of its own kind: what the end-to-end tests cannot take away from a server."""

import asyncio
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.conftest import environment
from tolserve.engine.client import EngineClient
from tolserve.engine.request import Request, SamplingParams
from tolserve.settings import ServeSettings

PATIENCE = 90.0


async def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)


def test_a_shortage_of_descriptors_delays_the_next_engine_and_no_more(
    tiny_model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    settings = ServeSettings(model=tiny_model_dir, cache_dir=cache_dir, threads=1)

    async def run() -> None:
        client = EngineClient(settings.engine_json())
        client.start()
        try:
            await eventually(lambda: client.ready is not None)
            pid = client._child.process.pid if client._child is not None else 0
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            os.kill(pid, 9)
            await eventually(lambda: client.failure is not None)
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, hard))
            try:
                await asyncio.sleep(2.0)  # over two attempts
                assert client.ready is None
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await eventually(lambda: client.ready is not None)
            sampling = SamplingParams(max_tokens=2, ignore_eos=True)
            deltas = [delta async for delta in client.generate(Request("r", (1,), sampling))]
            assert deltas[-1].finish_reason == "length"
        finally:
            await client.stop()

    asyncio.run(run())
