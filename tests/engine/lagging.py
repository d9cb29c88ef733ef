"""A device as late as it may be: its work is done when somebody waits for it, and not before.

Two streams of closures stand for the compute stream and the fill stream. Each runs in its own order; what orders one
behind the other is what the code asked for by events, and nothing else. So a missing event is not a race that a test
may or may not lose: it loses.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tolserve.engine.ahead import LookaheadEngine
from tolserve.engine.graphs import Decoder, Launch, Row, _Staging
from tolserve.tol import part, slotmap, tiers
from tolserve.tol.arena import DeviceArena, DeviceMap
from tolserve.tol.table import Bytes

Work = Callable[[], object]


class Stream:
    """Work in order. `haste` is the chance that some of it is found done when somebody looks."""

    def __init__(self, haste: float, seed: int) -> None:
        self._work: deque[Work] = deque()
        self._added = self.done = 0
        self._lock = threading.RLock()
        self._haste, self._dice = haste, random.Random(seed)

    def add(self, work: Work) -> "Mark":
        with self._lock:
            self._work.append(work)
            self._added += 1
            return Mark(self, self._added)

    def mark(self) -> "Mark":
        return Mark(self, self._added)

    def run_to(self, number: int) -> None:
        with self._lock:
            while self.done < number:
                self.done += 1
                self._work.popleft()()

    def looked_at(self, number: int) -> None:
        if self._dice.random() < self._haste:
            self.run_to(number)


class Mark:
    """What an event is to the code."""

    def __init__(self, stream: Stream, number: int) -> None:
        self._stream, self._number = stream, number

    def synchronize(self) -> None:
        self._stream.run_to(self._number)

    def query(self) -> bool:
        self._stream.looked_at(self._number)
        return self._stream.done >= self._number


class Late:
    """Both streams, and the classes that use them."""

    def __init__(self, seed: int = 0, compute_haste: float = 0.0, fill_haste: float = 0.5) -> None:
        self.compute, self.fill = Stream(compute_haste, seed), Stream(fill_haste, seed + 1)

    def flush(self) -> None:
        for stream in (self.fill, self.compute, self.fill):
            stream.mark().synchronize()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (part, tiers):
            monkeypatch.setattr(module, "DeviceArena", late_arena(self))
        monkeypatch.setattr(slotmap, "DeviceMap", late_map(self))

    def slow_down(self, engine: LookaheadEngine) -> None:
        """Have the engine's steps run late as well. Those with prompts run at once, behind all before them."""
        engine.decoder.__class__ = LateDecoder
        engine.decoder.late = self  # type: ignore[attr-defined]
        run = engine.runner.run

        def behind(*args: Any) -> Any:
            self.compute.mark().synchronize()
            return run(*args)

        engine.runner.run = behind  # type: ignore[method-assign]


def late_arena(late: Late) -> type[DeviceArena]:
    class LateArena(DeviceArena):
        def fence(self) -> Any:
            return late.compute.mark()

        def write(self, slot: int, payload: Bytes, fence: Any, stays: bool = False) -> Any:
            source = payload if stays else payload.copy()
            copy = super().write

            def fill() -> None:
                if fence is not None:
                    fence.synchronize()
                copy(slot, source, None)

            return late.fill.add(fill)

        def ready(self, events: Iterable[Any]) -> None:
            for event in events:
                late.compute.add(event.synchronize)
            late.compute.mark().synchronize()  # a step that runs eagerly reads the rows at once

        def quiet(self) -> None:
            late.flush()

    return LateArena


def late_map(late: Late) -> type[DeviceMap]:
    class LateMap(DeviceMap):
        def write(self, tokens: Any, places: Any) -> None:
            change = super().write
            late.compute.add(lambda: change(tokens, places))

        def ready(self, events: Iterable[Any]) -> None:
            for event in events:
                late.compute.add(event.synchronize)

    return LateMap


class LateDecoder(Decoder):
    late: Late

    def _submit(self, staging: _Staging, rows: list[Row], size: int) -> Launch:
        submit = super()._submit
        launches: list[Launch] = []
        staging.result.fill_(7)  # what a host sees that does not wait
        mark = self.late.compute.add(lambda: launches.append(submit(staging, rows, size)))
        return LateLaunch(len(rows), staging.result, launches, mark)


class LateLaunch(Launch):
    def __init__(self, count: int, result: Tensor, launches: list[Launch], mark: Mark) -> None:
        super().__init__(count, result, torch.empty(0), mark)
        self._launches = launches

    def choices(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self._launches[0].choices(rows)
