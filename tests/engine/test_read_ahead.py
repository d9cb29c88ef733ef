"""Reads for coming steps: of prompts that run, then of those that wait, and never more than a decode can stand."""

import threading
import time
from collections.abc import Iterable

from engine.driver import Answers, OpenEngine, assert_idle, collect, finish, request, serve, submit
from engine.test_engine import STEP, assert_same_output
from tol.tables import HeldTable, value
from tolserve.engine.engine import Engine
from tolserve.tol.pager import Pager
from tolserve.tol.table import Bytes, Table

FIRST = request("first", [1, 2, 3], 40)
COLD = range(100, 300)


def pager_of(engine: Engine) -> Pager:
    assert engine.pager is not None
    return engine.pager


def step_until_read(engine: Engine, answers: Answers) -> None:
    """Run a few steps, and then as many as it takes until no read is on its way."""
    for _ in range(5):
        collect(answers, engine.step())
    deadline = time.monotonic() + 60
    while pager_of(engine).ahead and time.monotonic() < deadline:
        time.sleep(0.002)
        engine.refresh_metrics()
    assert not pager_of(engine).ahead


class SlowFor(Table):
    """A table whose reads of the given tokens last until they are let go: they stay on their way."""

    def __init__(self, table: Table, tokens: Iterable[int]) -> None:
        super().__init__(table.path, table.manifest, table.checksums)
        self._tokens, self.go = set(tokens), threading.Event()

    def check(self, token: int, payload: Bytes, groups: range | None = None) -> None:
        if token in self._tokens:
            self.go.wait(60)
        super().check(token, payload, groups)


def started_ahead(engine: Engine, tokens: Iterable[int]) -> set[int]:
    """Those of the tokens whose reads a step starts that does not need them."""
    pager = pager_of(engine)
    pager.disk._table = table = SlowFor(pager.table, tokens)
    try:
        engine.step()
        return set(pager.parts[0].arriving)
    finally:
        table.go.set()


def test_a_queued_prompts_records_are_read_before_it_runs(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="200", max_num_seqs=1) as engine:
        answers: Answers = {}
        submit(engine, [FIRST, request("queued", COLD[:20], 1)])
        step_until_read(engine, answers)
        assert value(engine.registry, "tol_fills_total", "disk", "prefetch") == 20
        assert [s.request_id for s in engine.scheduler.waiting] == ["queued"]
        finish(engine, answers)
        usage = answers["queued"].usage
        assert usage is not None
        assert (usage.lookups, usage.hits) == (20, 20)
        assert_idle(engine)


def test_waiting_prompts_take_a_bounded_share_of_the_slots_in_order(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="80", max_num_seqs=1) as engine:
        pager = pager_of(engine)
        answers: Answers = {}
        submit(engine, [FIRST, *(request(f"queued{i}", COLD[7 * i : 7 * i + 7], 1) for i in range(3))])
        for _ in range(20):
            collect(answers, engine.step())
            assert pager.prefetched <= 10
        step_until_read(engine, answers)
        assert pager._unused == set(COLD[:10]), "all of the first prompt, some of the second"
        engine.abort("queued0")
        assert pager.prefetched == 3, "what an aborted one had asked for binds nothing"
        step_until_read(engine, answers)
        assert pager._unused == set(COLD[7:17])
        finish(engine, answers)
        assert not pager.prefetched
        assert_idle(engine)


def test_records_of_running_prompts_are_read_first(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="240", max_num_seqs=1, max_num_batched_tokens=STEP) as engine:
        engine.scheduler.max_fills = STEP + 4
        running, waiting = list(COLD[: 4 * STEP]), list(COLD[4 * STEP : 8 * STEP])
        submit(engine, [request("running", running, 2), request("waiting", waiting, 2)])
        assert started_ahead(engine, COLD[STEP:]) == {*running[STEP : 2 * STEP], *waiting[:4]}
        finish(engine)
        assert_idle(engine)


def test_where_one_decodes_next_few_reads_are_started_ahead(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="64", max_num_batched_tokens=STEP) as engine:
        engine.scheduler.max_fills = 3
        submit(engine, [request("short", [COLD[-1]], 4)])
        engine.step()
        (decoding,) = engine.scheduler.running
        cold = [token for token in COLD if token not in decoding.tokens][: 4 * STEP]
        submit(engine, [request("cold", cold, 2)])
        assert started_ahead(engine, cold[3:]) == set(cold[3:6]), "three for this step, three for the next"
        finish(engine)
        assert_idle(engine)


def test_decodes_wait_for_few_reads_of_prompts_that_arrive(engine_of: OpenEngine) -> None:
    prompts = [request(f"cold{i}", COLD[40 * i : 40 * i + 40], 3) for i in range(5)]
    with engine_of(device_cache="100%") as engine:
        right = serve(engine, [FIRST, *prompts])
    with engine_of(device_cache="120", max_num_seqs=4) as engine:
        engine.scheduler.max_fills = fills = 5

        def missed() -> float:
            return value(engine.registry, "tol_misses_total")

        answers: Answers = {}
        submit(engine, [FIRST])
        while not answers:
            collect(answers, engine.step())
        submit(engine, prompts)
        while engine.busy:
            before, decodes = missed(), sum(s.pending == 1 for s in engine.scheduler.running)
            collect(answers, engine.step())
            if decodes:
                assert missed() - before <= 2 * fills + decodes, "their own, those on their way, and new ones"
        assert value(engine.registry, "tol_fills_total", "disk", "prefetch") > 0
        assert_same_output(answers, right)
        assert_idle(engine)


def test_the_next_chunks_records_are_read_while_a_chunk_runs(engine_of: OpenEngine) -> None:
    """Reads are held back, so the first chunk cannot have run when the second one's are seen to be on their way."""
    with engine_of(device_cache="64", max_num_batched_tokens=STEP, tol_io="buffered") as engine:
        assert engine.pager is not None
        table = HeldTable(engine.pager.table)
        engine.pager.disk._table = table
        prompt = list(range(100, 100 + 4 * STEP))
        submit(engine, [request("r", prompt, 2)])
        answers: Answers = {}
        with table.held() as go:
            first = threading.Thread(target=lambda: collect(answers, engine.step()))
            first.start()
            deadline = time.monotonic() + 60
            arriving, disk = engine.pager.parts[0].arriving, engine.pager.disk
            while (len(arriving) < 2 * STEP or disk.peak_outstanding < 2) and time.monotonic() < deadline:
                time.sleep(0.002)
            on_their_way = set(arriving)
            ran = not first.is_alive()
            go.set()
            first.join()
        assert not ran
        assert on_their_way == set(prompt[: 2 * STEP])
        finish(engine, answers)
        assert len(answers["r"].tokens) == 2
        assert value(engine.registry, "tol_fills_total", "disk", "prefetch") == 3 * STEP
        assert engine.pager.disk.peak_outstanding > 1
        assert_idle(engine)
