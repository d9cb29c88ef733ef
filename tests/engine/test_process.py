"""What the engine process does before it says that it is ready."""

from copy import deepcopy

import pytest

from engine.driver import OpenEngine
from tolserve.engine.engine import Engine
from tolserve.engine.process import warm_up
from tolserve.metrics import Metric


def counted(engine: Engine) -> list[Metric]:
    return deepcopy([metric for metric in engine.registry.snapshot() if metric.kind != "gauge"])


@pytest.mark.parametrize("max_model_len", [None, 1, 2])
def test_a_warm_up_runs_the_model_and_counts_nothing(engine_of: OpenEngine, max_model_len: int | None) -> None:
    with engine_of(device_cache="16", max_model_len=max_model_len) as engine:
        before = counted(engine)
        warm_up(engine)
        assert counted(engine) == before
        assert not engine.busy
        assert engine.pager is not None
        assert engine.pager.view(16).used > 0
        engine.pager.check()
