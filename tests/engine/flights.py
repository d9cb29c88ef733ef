"""Engines that launch steps ahead, requests for them, and what keeps their steps in order, each to be taken away."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.driver import request
from engine.lagging import Late
from engine.test_engine import prompt_of
from tolserve.engine.ahead import LookaheadEngine
from tolserve.engine.assemble import assemble
from tolserve.engine.config import EngineSettings
from tolserve.engine.graphs import Decoder, Launch, Row
from tolserve.engine.request import Request
from tolserve.tol.slotmap import Maps, SlotMap


@contextlib.contextmanager
def open_ahead(model_dir: Path, cache_dir: Path, late: Late | None = None, **options: Any) -> Iterator[LookaheadEngine]:
    """On the CPU unless told otherwise; `late` makes it a device that is as late as it may be."""
    told = EngineSettings(model=str(model_dir), cache_dir=str(cache_dir), **{"device": "cpu"} | options)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if late is not None:
            late.patch(monkeypatch)
        engine = assemble(told, ahead=True)
        assert isinstance(engine, LookaheadEngine)
        if late is not None:
            late.slow_down(engine)
        try:
            yield engine
        finally:
            engine.close()


def requests_of(seed: int, count: int = 10) -> list[Request]:
    """Short and long, greedy and drawn; one in eight wants log-probabilities, which no step runs ahead of."""
    dice = random.Random(seed)
    requests = []
    for index in range(count):
        drawn = {"temperature": 0.9, "top_k": 50, "seed": index} if dice.random() < 0.3 else {}
        scored = {"logprobs": 2} if dice.random() < 0.12 else {}
        prompt = prompt_of(dice.choice([1, 2, 3, 9, 25, 40]), seed * 100 + index)
        requests.append(request(f"r{index}", prompt, dice.randrange(1, 24), **drawn, **scored))
    return requests


def _never_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotMap, "remove", lambda self, token: self._come.pop(token, None))


def _shown_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    put = SlotMap.put
    monkeypatch.setattr(SlotMap, "put", lambda self, token, place, event: put(self, token, place, None))


def _read_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Launch) -> tuple[list[int], list[bool]]:
        tokens, missed = self._result[:, : self._count].tolist()
        return tokens, [bool(flag) for flag in missed]

    monkeypatch.setattr(Launch, "read", read)


def _not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's records are given up while it runs."""
    settle = LookaheadEngine._settle

    def settled(self: LookaheadEngine, flight: Any) -> None:
        settle(self, flight)
        if self.pager is not None:
            for lease in flight.leases():
                self.pager.release(lease, over=True)

    monkeypatch.setattr(LookaheadEngine, "_settle", settled)


def _not_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that a step reads in host memory may be overwritten there."""
    monkeypatch.setattr(Maps, "in_place", lambda self, token: False)


def _one_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch writes into the buffer that the one before it still copies from."""
    launch = Decoder.launch

    def launched(self: Decoder, rows: list[Row]) -> Launch:
        self._stagings = self._stagings[:1] * 2
        return launch(self, rows)

    monkeypatch.setattr(Decoder, "launch", launched)


ORDERS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "nothing": lambda monkeypatch: None,
    "a victim's entry is cleared before its slot is used again": _never_cleared,
    "an entry is set behind its fill": _shown_too_early,
    "the host reads tokens behind the step": _read_too_early,
    "a step's records are pinned until it is over": _not_pinned,
    "what a step reads in host memory stays there": _not_lent,
    "a buffer is written when the copy out of it is through": _one_staging,
}
