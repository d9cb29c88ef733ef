"""An engine process and its heartbeats, seen from its parent."""

import asyncio
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from e2e.conftest import environment
from tolserve.engine.child import STEP_SECONDS, Child
from tolserve.engine.messages import Heartbeat, decode_from_engine, encode
from tolserve.engine.pulse import PERIOD_SECONDS, Pulse
from tolserve.settings import ServeSettings


def test_a_pulse_says_how_long_the_step_has_run(tmp_path: Path) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    socket.bind(f"ipc://{tmp_path}/pulse")
    pulse = Pulse(f"ipc://{tmp_path}/pulse")

    def beat() -> float:
        assert socket.poll(30_000)
        message = decode_from_engine(socket.recv())
        assert isinstance(message, Heartbeat)
        return message.step_seconds

    pulse.start()
    try:
        assert beat() == 0
        pulse.step_begins()
        ages = [beat() for _ in range(4)]
        assert ages == [age * PERIOD_SECONDS for age in range(ages[0] > 0, 4 + (ages[0] > 0))]
        pulse.step_ends()
        pulse.step_begins()  # another one, however soon
        assert 0 in [beat(), beat()]
        pulse.step_ends()
        assert 0 in [beat(), beat()]
        assert beat() == 0
    finally:
        pulse.close()
        context.destroy(linger=0)


def test_a_step_that_never_ends_is_a_hang(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeats of such an engine are sent from here, beside its own."""
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])

    async def run() -> None:
        context = zmq.asyncio.Context()
        settings = ServeSettings(model=tiny_model_dir, cache_dir=tmp_path).engine_json()
        child = Child(context, settings, lambda _: None)
        try:
            second = context.socket(zmq.PUSH)
            second.connect(f"ipc://{child._folder.name}/pulse.sock")
            watch = asyncio.create_task(child.watch())
            while child.ready_since is None:
                await second.send(encode(Heartbeat(STEP_SECONDS + 1)))  # while it loads this means nothing
                await asyncio.sleep(0.05)
                assert child.ready_since is not None or not watch.done()
            while not watch.done():
                await second.send(encode(Heartbeat(STEP_SECONDS + 1)))
                await asyncio.sleep(0.02)
            end = watch.result()
            assert end.reason == "hang"
            assert "one step" in end.message
        finally:
            await child.close()
            context.destroy(linger=0)
        assert child.process.returncode == -9

    asyncio.run(run())
