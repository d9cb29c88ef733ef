"""Decoding on a CUDA device: steps in graphs, one ahead of the host, and every order that keeps them right.

The same engine runs on the CPU in tests/engine, on a device that is as late as it may be. Here the device is real, and
late where a kernel that sleeps makes it so.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.driver import Answers, assert_idle, collect, finish, request, serve, submit
from engine.flights import ORDERS, open_ahead, requests_of
from engine.test_engine import prompt_of
from tol.tables import make_table, value
from tolserve.engine.ahead import LookaheadEngine
from tolserve.engine.assemble import assemble
from tolserve.engine.config import EngineSettings
from tolserve.engine.graphs import Decoder, Launch
from tolserve.metrics import Metrics
from tolserve.tol.arena import DeviceArena, Event
from tolserve.tol.pager import Pager
from tolserve.tol.part import Part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = {"device": "cuda", "dtype": "float32"}  # whose greedy tokens no other order of sums changes here
# Some 10 ms at 1 to 2 GHz: longer than anything that the host does in a step of these models.
CYCLES = 20_000_000


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


Alone = Callable[[int], dict[str, list[int]]]


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path, cache_dir: Path) -> Iterator[Alone]:
    """`alone(seed)`: what requests_of(seed) get on this device one at a time, without steps ahead."""
    told = EngineSettings(model=str(tiny_model_dir), cache_dir=str(cache_dir), device_cache="100%", **CUDA)
    engine = assemble(told, ahead=False)
    known: dict[int, dict[str, list[int]]] = {}

    def tokens(seed: int) -> dict[str, list[int]]:
        if seed not in known:
            known[seed] = {each.request_id: serve(engine, [each])[each.request_id].tokens for each in requests_of(seed)}
        return known[seed]

    yield tokens
    engine.close()


def tokens_of(answers: Answers) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


@pytest.mark.parametrize(
    "tiers",
    [
        {"device_cache": "100%"},
        {"device_cache": "64"},
        {"device_cache": "64", "host_cache": "40"},
        {"device_cache": "30", "host_cache": "100%"},
        {"device_cache": "16", "max_num_batched_tokens": 16},
        {"device_cache": "64", "max_num_seqs": 3},
    ],
)
def test_answers_are_those_of_steps_one_by_one(
    tiny_model_dir: Path, cache_dir: Path, alone: Alone, tiers: dict[str, Any]
) -> None:
    for seed in range(3):
        with open_ahead(tiny_model_dir, cache_dir, **CUDA | {"max_num_seqs": 7} | tiers) as engine:
            assert tokens_of(serve(engine, requests_of(seed))) == alone(seed)
            assert_idle(engine)


def decoding(engine: LookaheadEngine, count: int, tokens: int) -> Answers:
    """Have that many sequences decode, a step ahead."""
    submit(engine, [request(f"r{i}", prompt_of(9, i), tokens) for i in range(count)])
    answers: Answers = {}
    while engine._flight is None or any(sequence.generated < 3 for sequence in engine.scheduler.sequences()):
        collect(answers, engine.step())
    return answers


@pytest.mark.parametrize("tiers", [{"device_cache": "100%"}, {"device_cache": "64", "host_cache": "100%"}])
@pytest.mark.parametrize("count", [1, 5])
def test_nothing_waits_for_the_device_but_for_its_tokens(
    tiny_model_dir: Path, cache_dir: Path, tiers: dict[str, Any], count: int
) -> None:
    with open_ahead(tiny_model_dir, cache_dir, **CUDA | tiers) as engine:
        answers = decoding(engine, count, 60)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiled:
            torch.cuda.set_sync_debug_mode("error")
            try:
                with torch.profiler.record_function("decoding"):
                    for _ in range(20):
                        collect(answers, engine.step())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        events = profiled.events()
        (span,) = [event.time_range for event in events if event.name == "decoding" and event.device_type.name == "CPU"]
        inside = [event.name for event in events if span.start <= event.time_range.start < span.end]
        assert inside.count("cudaGraphLaunch") == 20, "the steps are no graphs"
        # One of a step's own, and staging buffers of copies from host memory, which are through.
        waits = {name for name in inside if "Synchronize" in name or name in ("cudaMemcpy", "cudaFree", "cudaMalloc")}
        assert waits <= {"cudaEventSynchronize"}
        finish(engine, answers)
        assert_idle(engine)


def test_steps_allocate_no_device_memory(tiny_model_dir: Path, cache_dir: Path) -> None:
    with open_ahead(tiny_model_dir, cache_dir, **CUDA, device_cache="64") as engine:
        answers = decoding(engine, 4, 80)
        before = torch.cuda.memory_reserved()
        finish(engine, answers)
        assert torch.cuda.memory_reserved() == before


def test_graphs_are_made_anew_when_the_tiers_change(tiny_model_dir: Path, cache_dir: Path, alone: Alone) -> None:
    for sizes in (("40", None), ("100", "50"), (None, "20"), ("300", "0")):
        with open_ahead(tiny_model_dir, cache_dir, **CUDA, device_cache="64", host_cache="30") as engine:
            submit(engine, requests_of(1))
            answers: Answers = {}
            for _ in range(9):
                collect(answers, engine.step())
            engine.resize(*sizes)
            for _ in range(9):
                collect(answers, engine.step())
            if engine.pager is not None:
                engine.reopen()
            assert tokens_of(finish(engine, answers)) == alone(1)
            assert_idle(engine)


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    submit_step = Decoder._submit

    def slowed(self: Decoder, *args: Any) -> Launch:
        torch.cuda._sleep(CYCLES)
        return submit_step(self, *args)

    monkeypatch.setattr(Decoder, "_submit", slowed)


def slow_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = DeviceArena._launch

    def slowed(self: DeviceArena, slot: int, source: torch.Tensor, fence: Event | None) -> Event:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(CYCLES)
        return launch(self, slot, source, fence)

    monkeypatch.setattr(DeviceArena, "_launch", slowed)


@pytest.mark.parametrize("slow", [slow_steps, slow_fills])
@pytest.mark.parametrize("name", ORDERS)
def test_each_order_is_missed_when_it_is_removed(
    tiny_model_dir: Path,
    cache_dir: Path,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    slow: Callable[[pytest.MonkeyPatch], None],
    name: str,
) -> None:
    """Some are missed where steps are slow, some where fills are."""
    ORDERS[name](monkeypatch)
    slow(monkeypatch)
    noticed = 0
    for seed in range(3):
        tiers = {"device_cache": "32", "host_cache": "40" if seed % 2 else "8"}
        with open_ahead(tiny_model_dir, cache_dir, **CUDA, max_num_seqs=6, **tiers) as engine:
            try:
                noticed += tokens_of(serve(engine, requests_of(seed))) != alone(seed)
            except (RuntimeError, IndexError, KeyError):
                noticed += 1
    if name == "nothing":
        assert not noticed
    elif (name == "an entry is set behind its fill") == (slow is slow_fills):
        assert noticed


def no_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "read_by", lambda self, slots: None)


def no_waiting_for_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "ready", lambda self, slots: None)


def one_staging_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned buffer of a thread is written while its last copy runs."""
    staging = DeviceArena._staging

    def hasty(self: DeviceArena, size: int) -> tuple[torch.Tensor, Event]:
        return staging(self, size)[0], Event()

    monkeypatch.setattr(DeviceArena, "_staging", hasty)


@pytest.mark.parametrize("removed", [None, no_fences, no_waiting_for_fills, one_staging_at_once])
def test_the_orders_of_steps_with_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: Callable[[pytest.MonkeyPatch], None] | None
) -> None:
    """Steps read their slots late and fills arrive late; each step must see the table's records all the same."""
    if removed is not None:
        removed(monkeypatch)
    slow_fills(monkeypatch)
    table, records = make_table(tmp_path / "tol", vocab_size=40)
    pager = Pager(table, device_slots=4, host_slots=0, device="cuda", metrics=Metrics())
    (part,) = pager.parts
    seen: list[tuple[list[int], torch.Tensor]] = []
    try:
        for first in range(0, 40, 4):
            tokens = [*range(first, first + 4)]
            lease = pager.acquire(tokens)
            lease.wait()
            torch.cuda._sleep(CYCLES)
            slots = torch.tensor([lease.slots[0][token] for token in tokens]).pin_memory().cuda(non_blocking=True)
            seen.append((tokens, part.arena.data.index_select(0, slots)))
            pager.release(lease)
        torch.cuda.synchronize()
        right = all(np.array_equal(rows[:, : part.bytes].cpu().numpy(), records[tokens]) for tokens, rows in seen)
        assert right == (removed is None)
    finally:
        pager.close()


def test_what_was_read_is_counted(tiny_model_dir: Path, cache_dir: Path) -> None:
    with open_ahead(tiny_model_dir, cache_dir, **CUDA, device_cache="40", host_cache="100%") as engine:
        serve(engine, requests_of(2))
        assert value(engine.registry, "tol_misses_total", "host") > 0
        assert value(engine.registry, "num_sat_out_total") == 0, "what lies in host memory is read there"
        assert_idle(engine)
