"""Prefix caching: what was computed is used again, by those who may, and the answers stay what they are."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.driver import Answer, Answers, OpenEngine, assert_idle, collect, finish, request, serve, submit
from engine.flights import open_ahead
from engine.lagging import Late
from engine.test_engine import assert_same_output, prompt_of, tokens_told, told_by
from engine.test_faults import BAD
from engine.test_read_ahead import pager_of
from engine.test_scheduler import BLOCK_SIZE, Load, scheduler_of, sequence_of
from tol.tables import flip_byte, value
from tolserve.engine.assemble import BLOCK_SIZE as ENGINE_BLOCK
from tolserve.engine.blocks import BlockPool
from tolserve.engine.engine import Engine
from tolserve.engine.request import Request
from tolserve.engine.sequence import Sequence
from tolserve.model.build import BuildOptions, build_table
from tolserve.tol.table import Table

KEYS = [bytes([number]) for number in range(5)]
uses = st.lists(
    st.tuples(
        st.sampled_from(["grow", "grow", "release", "name", "take"]), st.integers(0, 3), st.integers(0, 60),
        st.sampled_from(KEYS),
    ),
    max_size=60,
)  # fmt: skip


class SlowPool:
    """Which blocks a pool may hand out and find: a list of tables, and one of named blocks in order of their use."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.tables: list[list[int]] = [[] for _ in range(4)]
        self.named: list[tuple[int, bytes]] = []  # those let go longest ago first, as far as nobody holds them

    def held(self) -> set[int]:
        return {block for table in self.tables for block in table}

    def handed_out(self, block: int) -> None:
        """A block that nobody holds; one with a name only if all have one, and then the oldest."""
        assert block not in self.held()
        idle = [named for named, _ in self.named if named not in self.held()]
        if len(self.held()) + len(idle) == self.blocks:
            assert block == idle[0]
        self.named = [(named, key) for named, key in self.named if named != block]

    def released(self, table: list[int]) -> None:
        for block in reversed(table):
            table.remove(block)
            again = [pair for pair in self.named if pair[0] == block and block not in self.held()]
            self.named = [pair for pair in self.named if pair not in again] + again


@given(st.integers(1, 16), uses)
@settings(max_examples=300)
def test_the_pool_against_a_slow_twin(blocks: int, trace: list[tuple[str, int, int, bytes]]) -> None:
    pool, slow = BlockPool(blocks, BLOCK_SIZE), SlowPool(blocks)
    tables: list[list[int]] = [[] for _ in range(4)]
    for action, index, number, key in trace:
        table, twin = tables[index], slow.tables[index]
        if action == "grow":
            missing = pool.needed(number) - len(table)
            assert pool.grow(table, number) == (missing <= blocks - len(slow.held()))
            for block in table[len(twin) :]:
                slow.handed_out(block)
                twin.append(block)
        elif action == "release":
            pool.release(table)
            slow.released(twin)
        elif action == "name" and table:
            block = table[number % len(table)]
            pool.name(block, key)
            if all(block != named and key != other for named, other in slow.named):
                slow.named.append((block, key))
        elif action == "take" and (found := pool.find(key)) is not None and found not in table:
            pool.hold(found)
            table.append(found)
            twin.append(found)
        assert tables == slow.tables
        named = {key: block for block, key in slow.named}
        assert [pool.find(key) for key in KEYS] == [named.get(key) for key in KEYS]
        assert pool.free == blocks - len(slow.held())
        pool.check()


def run_to_the_end(load: Load, *sequences: Sequence) -> None:
    for sequence in sequences:
        load.scheduler.add(sequence)
    while any(load.scheduler.sequences()):
        step(load)


def step(load: Load) -> None:
    pending = {id(sequence): sequence.pending for sequence in load.scheduler.running}
    chunks = load.scheduler.schedule()
    load.check(chunks, pending)
    load.advance(chunks)


TEXT = list(range(4 * BLOCK_SIZE + 1))


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=14), st.sampled_from([None, "a", "b"])), max_size=12))
def test_a_hit_is_the_longest_beginning_that_was_computed(texts: list[tuple[list[int], str | None]]) -> None:
    """Against every beginning of whole blocks that ran before, one after another in a pool that is large enough."""
    load = Load(scheduler_of(blocks=200), 2, [], random.Random(0))
    seen: set[tuple[str | None, tuple[int, ...]]] = set()
    for text, salt in texts:
        sequence = sequence_of([*text, 0], 6, salt=salt)
        known = [n for n in range(0, len(text) + 1, BLOCK_SIZE) if (salt, tuple([*text, 0][:n])) in seen or not n]
        run_to_the_end(load, sequence)
        assert sequence.cached == max(known)
        ran = sequence.tokens[:-1]
        seen |= {(salt, tuple(ran[:n])) for n in range(BLOCK_SIZE, len(ran) + 1, BLOCK_SIZE)}


def test_after_an_exchange_of_the_table_nothing_from_before_is_found() -> None:
    """Not what lies there, not what sequences add that began before it, not by those that looked before it."""
    load = Load(scheduler_of(blocks=100, max_seqs=2), 100, [], random.Random(0))
    run_to_the_end(load, sequence_of(TEXT))
    straddling, waiting = sequence_of([*TEXT, 77], 20, arrived=1), sequence_of([*TEXT, 78], arrived=2)
    other = sequence_of([5], 3, arrived=1)
    for sequence in (straddling, other, waiting):
        load.scheduler.add(sequence)
    step(load)
    assert load.scheduler.known(waiting), "it has looked"
    load.exchange_table()
    while straddling in load.scheduler.running:
        step(load)
    run_to_the_end(load)
    assert (straddling.cached, waiting.cached) == (len(TEXT) - 1, 0)
    copy = sequence_of(straddling.tokens, arrived=3)
    run_to_the_end(load, copy)
    assert copy.cached == len(TEXT) - 1, "no more than what was computed after the exchange, of the other one's"


def test_a_preempted_sequence_that_saw_both_tables_begins_with_the_new_one() -> None:
    load = Load(scheduler_of(blocks=9), 100, [], random.Random(0))
    old, young = sequence_of(range(8), 24, arrived=1), sequence_of(range(50, 62), 12, arrived=2)
    for sequence in (old, young):
        load.scheduler.add(sequence)
    step(load)
    load.exchange_table()
    while not load.scheduler.preemptions:
        step(load)
    assert list(load.scheduler.waiting) == [young]
    run_to_the_end(load)
    assert young.generated == 12


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    load = Load(scheduler_of(blocks=8), 100, [], random.Random(0))
    old, young = sequence_of(range(8), 12, arrived=1), sequence_of(range(50, 62), 12, arrived=2)
    for sequence in (old, young):
        sequence.read_ahead = 1000
        load.scheduler.add(sequence)
    while not load.scheduler.preemptions:
        step(load)
    left = load.scheduler.known(young)
    assert len(left) == 4, "all but the last, which was not full, and which the older one took"
    assert load.scheduler.unread(young) == young.tokens[4 * BLOCK_SIZE :], "the other records may be gone by now"
    load.scheduler.remove(old)
    step(load)
    assert (young.cached, list(young.blocks[:4]), young.computed) == (0, left, len(young.tokens) - 1)


def conversation(turns: int, **sampling: Any) -> list[list[Request]]:
    """Rounds of requests, each with all that was said before in front; two users share a long beginning."""
    dice = random.Random(3)
    texts = [prompt_of(40, 1), prompt_of(40, 1), prompt_of(21, 2)]
    rounds: list[list[Request]] = []
    for turn in range(turns):
        rounds.append([])
        for user, text in enumerate(texts):
            text += prompt_of(dice.randrange(1, 20), 100 * turn + user)
            rounds[-1].append(request(f"{turn}-{user}", text, 5, **{"logprobs": 2} | sampling))
    return rounds


def talk(engine: Engine, rounds: list[list[Request]]) -> Answers:
    answers: Answers = {}
    for requests in rounds:
        answers |= serve(engine, requests)
    return answers


def cached(answer: Answer) -> int:
    assert answer.usage is not None
    return answer.usage.cached_tokens


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"device_cache": "100%"}, id="all there"),
        pytest.param({"device_cache": "24", "max_num_batched_tokens": 16}, id="chunks and misses"),
        pytest.param({"device_cache": "60", "max_model_len": 128, "kv_cache": f"{11 * 4096}B"}, id="few blocks"),
    ],
)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_answers_are_the_same_without_it(
    engine_of: OpenEngine, options: dict[str, Any], sampling: dict[str, Any]
) -> None:
    rounds = conversation(4, **sampling)
    with engine_of(prefix_cache=False, **options) as engine:
        right = talk(engine, rounds)
        assert sum(map(cached, right.values())) == 0
        assert value(engine.registry, "prefix_cache_queries_total") == 0
        assert_idle(engine)
    with engine_of(**options) as engine:
        answers = talk(engine, rounds)
        assert_same_output(answers, right)
        asked, hits = (value(engine.registry, f"prefix_cache_{name}_total") for name in ("queries", "hits"))
        assert asked == sum(len(each.prompt) for requests in rounds for each in requests)
        assert hits == sum(map(cached, answers.values())) > asked / 4
        assert_idle(engine)


@pytest.mark.parametrize("options", [{"device_cache": "100%"}, {"device_cache": "64"}], ids=["all there", "misses"])
def test_steps_launched_ahead_use_it_as_well(
    engine_of: OpenEngine, tiny_model_dir: Path, cache_dir: Path, options: dict[str, Any]
) -> None:
    rounds = conversation(5, logprobs=None)  # scored sequences are not launched ahead
    with engine_of(prefix_cache=False, device_cache="100%") as engine:
        right = talk(engine, rounds)
    with open_ahead(tiny_model_dir, cache_dir, Late(), **options) as engine:
        answers = talk(engine, rounds)
        assert_same_output(answers, right)
        asked = sum(answer.usage.prompt_tokens for answer in answers.values() if answer.usage)
        assert value(engine.registry, "prefix_cache_hits_total") == sum(map(cached, answers.values())) > asked / 4
        engine.scheduler.pool.check()
        assert_idle(engine)


def test_generated_tokens_are_found_in_the_next_turn(engine_of: OpenEngine) -> None:
    with engine_of(device_cache="100%") as engine:
        prompt = prompt_of(20, 1)
        first = serve(engine, [request("first", prompt, 30)])["first"]
        second = serve(engine, [request("second", [*prompt, *first.tokens, 7], 3)])["second"]
        assert cached(second) == 48, "of 49 tokens that ran"
        whole = serve(engine, [request("again", prompt_of(32, 9), 1), request("twin", prompt_of(32, 9), 1)])
        assert [cached(answer) for answer in whole.values()] == [0, 0], "both computed it, at the same time"
        assert cached(serve(engine, [request("third", prompt_of(32, 9), 1)])["third"]) == 16, "the last token runs"
        assert_idle(engine)


def test_tenants_with_different_salts_share_nothing(engine_of: OpenEngine) -> None:
    prompt = tuple(prompt_of(64, 1))
    sampling = request("r", prompt, 4).sampling
    salts = ["a", None, "b", "a", None, "b", "0/", "salta"]
    with engine_of(device_cache="100%") as engine:
        held = [serve(engine, [Request("r", prompt, sampling, salt)])["r"] for salt in salts]
    assert [cached(answer) for answer in held] == [0, 0, 0, 48, 48, 48, 0, 0]
    assert len({tuple(answer.tokens) for answer in held}) == 1


def test_a_prompt_that_is_to_be_scored_runs_whole(engine_of: OpenEngine) -> None:
    prompt = prompt_of(50, 1)
    with engine_of(device_cache="100%") as engine:
        scored = [serve(engine, [request("r", prompt, 2, prompt_logprobs=1)])["r"] for _ in range(2)]
        assert [cached(answer) for answer in scored] == [0, 0]
        assert scored[0].text == scored[1].text
        assert value(engine.registry, "prefix_cache_queries_total") == 0, "nothing was looked up"
        assert cached(serve(engine, [request("r", prompt, 2)])["r"]) == 48, "what it computed is there for others"


def test_after_a_failed_step_nothing_of_it_is_found(
    engine_of: OpenEngine, tiny_model_dir: Path, tmp_path: Path
) -> None:
    build_table(tiny_model_dir, tmp_path / "tol")
    flip_byte(Table.open(tmp_path / "tol"), BAD)
    with engine_of(table=str(tmp_path / "tol"), device_cache="64") as engine:
        prompt = [t % (BAD - 1) for t in prompt_of(40, 1)]
        assert serve(engine, [request("bad", [*prompt, BAD])])["bad"].failure is not None
        again = serve(engine, [request("good", prompt, 4)])["good"]
        assert cached(again) == 0
        fine = serve(engine, [request("once more", prompt, 4)])["once more"]
        assert (cached(fine), fine.tokens) == (32, again.tokens)
        assert_idle(engine)


def test_reopening_the_table_drops_what_was_computed(
    engine_of: OpenEngine, tiny_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tol"
    prompt = prompt_of(70, 1)
    asked = request("r", prompt, 6, logprobs=1)
    build_table(tiny_model_dir, path, BuildOptions("int4", group_size=32))
    with engine_of(table=str(path), any_encoding=True, device_cache="100%") as engine:
        right = serve(engine, [asked])
    build_table(tiny_model_dir, path, force=True)
    with engine_of(table=str(path), any_encoding=True, device_cache="100%") as engine:
        before = serve(engine, [asked])
        assert before["r"].logprobs != right["r"].logprobs
        assert cached(serve(engine, [asked])["r"]) == 64
        build_table(tiny_model_dir, path, BuildOptions("int4", group_size=32), force=True)
        engine.reopen()
        after = serve(engine, [asked])
        assert cached(after["r"]) == 0
        assert after["r"].text == right["r"].text
        assert cached(serve(engine, [asked])["r"]) == 64
        assert_idle(engine)


def test_what_did_not_run_was_not_looked_up(engine_of: OpenEngine) -> None:
    prompt = [*prompt_of(32, 1), 250, 251]
    with engine_of(device_cache="100") as engine:
        first = serve(engine, [request("first", prompt[:33], 1, token_hits=True)])["first"]
        second = serve(engine, [request("second", prompt, 3, token_hits=True)])["second"]
    assert len(first.token_hits) == 33
    assert None not in first.token_hits
    assert second.token_hits[:34] == [None] * 32 + [True, False]
    assert len(second.token_hits) == 36
    assert second.usage is not None
    assert second.usage.lookups == 4, "two of the prompt, two that were fed back"


def test_policies_hear_of_what_did_not_run_as_such(engine_of: OpenEngine) -> None:
    prompt = [*prompt_of(32, 1), 250, 251]
    with engine_of(device_cache="100") as engine:
        serve(engine, [request("first", prompt, 1)])
        told, recalled = told_by(engine), []
        policy = pager_of(engine).parts[0].policy
        policy.recall = lambda name, tokens: recalled.append((name, list(tokens)))  # type: ignore[method-assign]
        answer = serve(engine, [request("second", prompt, 3)])["second"]
    assert recalled == [("second", prompt[:32])]
    assert tokens_told(told, "second") == [*prompt[32:], *answer.tokens[:-1]]


def test_records_of_tokens_that_will_not_run_are_not_read_ahead(engine_of: OpenEngine) -> None:
    """What the second prompt's beginning would need was evicted since; only its own end is read."""
    shared, own = list(range(100, 132)), list(range(200, 206))
    with engine_of(device_cache="60", max_num_seqs=1, tol_policy="lru") as engine:
        serve(engine, [request("first", shared, 1), request("other", range(60), 1)])
        pager = pager_of(engine)
        assert not any(map(pager.present, shared))
        answers: Answers = {}
        submit(engine, [request("running", [1, 2, 3], 40), request("queued", [*shared, *own], 1)])
        for _ in range(30):
            collect(answers, engine.step())
        (queued,) = engine.scheduler.waiting
        assert (queued.begins, queued.read_ahead) == (32, 38)
        assert not any(map(pager.present, shared))
        assert all(map(pager.present, own))
        finish(engine, answers)
        assert cached(answers["queued"]) == 32


def test_the_cache_takes_no_block_that_somebody_needs(engine_of: OpenEngine) -> None:
    """Traffic of many texts through few blocks: each block is full of something known, and nobody is held up."""
    dice = random.Random(1)
    texts = [prompt_of(dice.randrange(20, 60), seed) for seed in range(12)]
    with engine_of(device_cache="100%", max_model_len=80, kv_cache=f"{6 * 4096}B", prefix_cache=False) as engine:
        alone = {n: serve(engine, [request("r", text, 6)])["r"].tokens for n, text in enumerate(texts)}
    seen: Counter[int] = Counter()
    with engine_of(device_cache="100%", max_model_len=80, kv_cache=f"{6 * 4096}B") as engine:
        for turn in range(40):
            which = dice.choice([0, 1, dice.randrange(12)])
            answer = serve(engine, [request(f"{turn}", texts[which], 6)])[f"{turn}"]
            assert answer.tokens == alone[which]
            seen[which] += cached(answer) > 0
            assert engine.scheduler.pool.free == engine.scheduler.pool.blocks == 6
        assert value(engine.registry, "num_preemptions_total") == 0
    assert seen[0] + seen[1] > 10
    assert ENGINE_BLOCK == 16, "as the figures here assume"
