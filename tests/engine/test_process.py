"""What the engine process does before it says that it is ready, and what it leaves when it ends."""

import time
from copy import deepcopy
from pathlib import Path

import pytest
import zmq

from engine.driver import OpenEngine, finish, request, submit
from tolserve.engine.engine import Engine
from tolserve.engine.look import LOOK_TIMEOUT_SECONDS
from tolserve.engine.messages import AskAttribution, AskPacks, AskToken, Look
from tolserve.engine.process import EngineServer, warm_up
from tolserve.engine.pulse import Pulse
from tolserve.engine.runner import StepResult
from tolserve.engine.sequence import Chunk
from tolserve.metrics import Metric
from tolserve.tol.frequencies import read_frequencies
from tolserve.tol.pager import Lease
from tolserve.tol.replay import Trace


def counted(engine: Engine) -> list[Metric]:
    return deepcopy([metric for metric in engine.registry.snapshot() if metric.kind != "gauge"])


@pytest.mark.parametrize("max_model_len", [None, 1, 2])
def test_a_warm_up_runs_the_model_and_counts_nothing(engine_of: OpenEngine, max_model_len: int | None) -> None:
    """A prompt and, where there is room for both, a decode; and both of a request that steers."""
    with engine_of(device_cache="16", max_model_len=max_model_len) as engine:
        before = counted(engine)
        run, counts, steers = engine.runner.run, list[int](), list[bool]()

        def noted(chunks: list[Chunk], lease: Lease | None) -> StepResult:
            counts.extend(chunk.count for chunk in chunks)
            steers.extend(chunk.sequence.steering is not None for chunk in chunks)
            return run(chunks, lease)

        engine.runner.run = noted  # type: ignore[method-assign]
        warm_up(engine)
        once = [1] if max_model_len == 1 else [2] if max_model_len == 2 else [2, 1]
        assert counts == 2 * once
        assert steers == [False] * len(once) + [True] * len(once)
        assert counted(engine) == before
        assert not engine.busy
        assert engine.pager is not None
        assert engine.pager.view(16).used > 0
        engine.pager.check()


def test_what_ran_is_recorded_once_whatever_became_of_its_sequence(engine_of: OpenEngine, tmp_path: Path) -> None:
    """Finished, aborted after a preemption, still running at the end, never run; and no warm-up."""
    files = {"tol_trace": str(tmp_path / "t.npz"), "tol_save_frequencies": str(tmp_path / "c.npz")}
    with engine_of(device_cache="20", max_num_seqs=1, max_num_batched_tokens=4, **files) as engine:
        warm_up(engine)
        submit(engine, [request("finished", [11, 12, 13], 1)])
        finish(engine)
        submit(engine, [request("preempted", range(20, 30), 5)])
        engine.step()
        (sequence,) = engine.scheduler.running
        engine.scheduler._preempt(sequence)
        engine.abort("preempted")
        submit(engine, [request("running", range(40, 50), 5), request("waiting", [60], 1)])
        engine.step()
        engine.finish()
    trace = Trace.load(tmp_path / "t.npz")
    sequences = [trace.documents([d]).tokens.tolist() for d in range(len(trace.offsets) - 1)]
    assert sequences == [[11, 12, 13], [20, 21, 22, 23], [40, 41, 42, 43]]
    counts = read_frequencies(tmp_path / "c.npz", 300)
    assert {token: n for token, n in enumerate(counts.tolist()) if n} == dict.fromkeys(
        (t for s in sequences for t in s), 1
    )


@pytest.mark.parametrize(
    "question", [AskToken(7, None, 3), AskAttribution(request("r", [1, 2], 0), None, None), AskPacks()]
)
def test_a_look_that_nobody_waits_for_any_more_costs_no_work(
    engine_of: OpenEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: Look
) -> None:
    with (
        engine_of(device_cache="16", packs=str(tmp_path)) as engine,
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as socket,
        monkeypatch.context() as idle,
    ):
        server = EngineServer(engine, socket, Pulse(f"ipc://{tmp_path}/pulse"))
        now = time.monotonic()
        assert server._look(now, question).declined is None
        for worker in ("runner", "packs", "scheduler"):
            idle.setattr(engine, worker, None)  # whoever works without them fails
        late = server._look(now - LOOK_TIMEOUT_SECONDS - 1, question).declined
        assert late is not None
        assert late.kind == "busy"
