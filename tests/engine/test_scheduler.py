"""The scheduler under random load: every step is legal, and everyone is served in the end."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tolserve.engine.blocks import BlockPool
from tolserve.engine.request import Request, SamplingParams
from tolserve.engine.scheduler import Scheduler
from tolserve.engine.sequence import Chunk, Sequence

BLOCK_SIZE = 4


def sequence_of(
    prompt: Iterable[int], max_tokens: int = 1, arrived: float = 0.0, salt: str | None = None, scored: bool = False
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=1 if scored else None)
    return Sequence(Request(f"{arrived}", tuple(prompt), params, salt), arrived)


def scheduler_of(
    blocks: int = 64, max_seqs: int = 8, max_tokens: int = 64, max_distinct: int | None = None, **cache: Any
) -> Scheduler:
    pool = BlockPool(blocks, BLOCK_SIZE)
    return Scheduler(pool, max_seqs=max_seqs, max_tokens=max_tokens, max_distinct=max_distinct, **cache)


@dataclass
class Load:
    """A scheduler's settings, and sequences by the step that they arrive before."""

    scheduler: Scheduler
    vocab_size: int
    arrivals: list[tuple[int, Sequence]]
    dice: random.Random
    memory: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, offset) -> what lies there
    own: dict[int, list[int]] = field(default_factory=dict)  # id(sequence) -> what it has computed, or taken over
    version: int = 0  # of the table

    @property
    def step_limit(self) -> int:
        """Far above what any order of service needs: every token alone in its step, many times over."""
        return 100 + 30 * sum(len(s.tokens) + s.request.sampling.max_tokens for _, s in self.arrivals)

    def run(self) -> None:
        waiting = sorted(self.arrivals, key=lambda arrival: arrival[0])
        for step in range(self.step_limit):
            while waiting and waiting[0][0] <= step:
                sequence = waiting.pop(0)[1]
                sequence.arrived = float(step)
                self.scheduler.add(sequence)
            here = list(self.scheduler.sequences())
            if not here and not waiting:
                return
            before = {id(sequence): sequence.decodes for sequence in self.scheduler.running}
            chunks = self.scheduler.schedule()
            assert bool(chunks) == bool(here), "a step is empty only when nobody is there"
            self.check(chunks, before)
            self.advance(chunks)
        pytest.fail(f"not done after {self.step_limit} steps: {self.scheduler.running} {self.scheduler.waiting}")

    def check(self, chunks: list[Chunk], decoded: dict[int, bool]) -> None:
        """`decoded` says of those that ran before whether they decode."""
        scheduler = self.scheduler
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks), "a sequence is in a step twice"
        assert sum(chunk.count for chunk in chunks) <= scheduler.max_tokens
        assert len(scheduler.running) <= scheduler.max_seqs
        if scheduler.max_distinct is not None:
            assert len({token for chunk in chunks for token in chunk.tokens}) <= scheduler.max_distinct
        self.check_blocks()
        for sequence in scheduler.waiting:
            assert not sequence.blocks
            assert not sequence.computed
        for chunk in chunks:
            assert chunk.sequence in scheduler.running
            assert chunk.count >= 1
            assert chunk.end <= len(chunk.sequence.tokens)
            assert len(chunk.sequence.blocks) * BLOCK_SIZE >= chunk.end, "no room for the chunk's keys"
            assert chunk.start == chunk.sequence.computed
            self.check_past(chunk, admitted=id(chunk.sequence) not in decoded)
        # 0: decodes of running sequences, 1: their prefills, 2: newly admitted ones
        kinds = [2 if (known := decoded.get(id(c.sequence))) is None else int(not known) for c in chunks]
        assert kinds == sorted(kinds), "a decode behind a prefill"

    def check_blocks(self) -> None:
        pool = self.scheduler.pool
        pool.check()
        owned = [block for sequence in self.scheduler.sequences() for block in sequence.blocks]
        assert len(set(owned)) + pool.free == pool.blocks, "a block is lost"
        for sequence in self.scheduler.sequences():
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for block in sequence.blocks[sequence.computed // BLOCK_SIZE :]:
                assert owned.count(block) == 1, "two sequences will write into a block"

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE

    def check_past(self, chunk: Chunk, admitted: bool) -> None:
        """What a chunk attends to is what its sequence left there, or would have."""
        sequence, start = chunk.sequence, chunk.start
        past = [self.memory[self.place(sequence, position)] for position in range(start)]
        if not admitted:
            assert past == self.own[id(sequence)][:start], "somebody wrote over its keys"
            return
        assert past == self.written(sequence, [], start), "it was given another text's keys"
        assert start < len(sequence.tokens), "the last token must run"
        scored = len(sequence.prompt_logprobs)
        assert scored in (0, sequence.prompt_length) or start < scored, "a prompt token would have no logprob"

    def written(self, sequence: Sequence, past: list[int], end: int) -> list[int]:
        """Keys and values of a sequence's first `end` tokens: each follows from all before it, and from the table."""
        past = list(past)
        for token in sequence.tokens[len(past) : end]:
            past.append(hash((past[-1] if past else sequence.request.cache_salt, token, self.version)))
        return past

    def write(self, chunk: Chunk, failed: bool = False) -> None:
        """A chunk's keys and values; of a step that fails garbage."""
        sequence = chunk.sequence
        past = [self.memory[self.place(sequence, position)] for position in range(chunk.start)]
        self.own[id(sequence)] = self.written(sequence, past, chunk.end)
        for position in range(chunk.start, chunk.end):
            self.memory[self.place(sequence, position)] = -1 if failed else self.own[id(sequence)][position]

    def fail(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self.write(chunk, failed=True)

    def exchange_table(self) -> None:
        self.version += 1
        self.scheduler.forget_prefixes()

    def advance(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            samples = chunk.samples
            self.write(chunk)
            self.scheduler.ran(chunk)
            if sequence.prompt_logprobs:
                more = min(chunk.end + 1, sequence.prompt_length) - len(sequence.prompt_logprobs)
                sequence.prompt_logprobs += [None] * more
            if samples and sequence.request.sampling.max_tokens:
                sequence.tokens.append(self.dice.randrange(self.vocab_size))
            if samples and sequence.generated >= sequence.request.sampling.max_tokens:
                self.scheduler.remove(sequence)


@st.composite
def loads(
    draw: st.DrawFn, distinct: st.SearchStrategy[int | None], spare_blocks: st.SearchStrategy[int], seqs: int = 6
) -> Load:
    vocab_size = draw(st.sampled_from([1, 3, 12, 40]))
    arrivals = []
    for _ in range(draw(st.integers(1, 9))):
        prompt = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=30))
        salt, scored = draw(st.sampled_from([None, None, "a", "b"])), draw(st.sampled_from([False, False, True]))
        arrivals.append((draw(st.integers(0, 20)), sequence_of(prompt, draw(st.integers(0, 12)), 0.0, salt, scored)))
    longest = max(len(s.tokens) + s.request.sampling.max_tokens for _, s in arrivals)
    scheduler = scheduler_of(
        blocks=-(-longest // BLOCK_SIZE) + draw(spare_blocks),
        max_seqs=draw(st.integers(1, seqs)),
        max_tokens=draw(st.sampled_from([1, 2, 5, 16, 64])),
        max_distinct=draw(distinct),
    )
    return Load(scheduler, vocab_size, arrivals, random.Random(draw(st.integers(0, 99))))


def assert_served(load: Load) -> None:
    load.run()
    for _, sequence in load.arrivals:
        assert sequence.generated == sequence.request.sampling.max_tokens
    assert load.scheduler.pool.free == load.scheduler.pool.blocks
    assert not list(load.scheduler.sequences())


@given(loads(distinct=st.one_of(st.none(), st.integers(1, 20)), spare_blocks=st.integers(0, 40)))
@settings(max_examples=250)
def test_everyone_is_served_by_legal_steps(load: Load) -> None:
    assert_served(load)


@given(loads(distinct=st.just(1), spare_blocks=st.integers(0, 5)))
@settings(max_examples=100)
def test_one_slot_is_enough(load: Load) -> None:
    assert_served(load)


@given(loads(distinct=st.one_of(st.none(), st.integers(1, 4)), spare_blocks=st.integers(0, 2), seqs=9))
@settings(max_examples=250)
def test_a_pool_for_hardly_more_than_one_sequence_serves_all(load: Load) -> None:
    assert_served(load)


def test_blocks_that_run_out_are_taken_from_the_youngest() -> None:
    scheduler = scheduler_of(blocks=5)  # all that one of them needs
    old, young = sequence_of(range(7), 12, arrived=1), sequence_of(range(9, 2, -1), 12, arrived=2)
    load = Load(scheduler, 10, [(0, old), (0, young)], random.Random(0))
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.preemptions:
        load.advance(scheduler.schedule())
    assert list(scheduler.sequences()) == [old, young]
    assert (list(young.blocks), young.computed) == ([], 0)
    assert old.computed > 7
    kept = list(young.tokens)
    while old in scheduler.running:
        load.advance(scheduler.schedule())
    assert scheduler.schedule() == [Chunk(young, 0, len(kept))], "what was generated is recomputed, not drawn again"


def test_the_youngest_gives_way_and_is_the_next_to_return() -> None:
    scheduler = scheduler_of(blocks=6, max_seqs=3)
    old, middle, young, later = sequences = [sequence_of(range(8), 9, arrived=i) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    load = Load(scheduler, 10, [], random.Random(0))
    load.advance(scheduler.schedule())
    assert scheduler.pool.free == 0
    assert [chunk.sequence for chunk in scheduler.schedule()] == [old, middle], "both grow into what was given up"
    assert list(scheduler.waiting) == [young, later]


def test_sequences_beyond_the_limit_wait_in_order() -> None:
    scheduler = scheduler_of(max_seqs=2)
    sequences = [sequence_of([1, 2], 3, arrived=i) for i in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    assert [chunk.sequence for chunk in scheduler.schedule()] == sequences[:2]
    assert list(scheduler.waiting) == sequences[2:]
    scheduler.remove(sequences[0])
    assert [chunk.sequence for chunk in scheduler.schedule()] == [sequences[1], sequences[2]]


def test_a_step_too_small_for_all_is_followed_by_one_for_the_others() -> None:
    scheduler = scheduler_of(max_distinct=2)
    sequences = [sequence_of([0], 9, arrived=i) for i in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    Load(scheduler, 1, [], random.Random(0)).advance(scheduler.schedule())
    for token, sequence in enumerate(sequences):
        sequence.tokens[-1] = token
    served = [[chunk.sequence for chunk in scheduler.schedule()] for _ in range(3)]
    assert [len(step) for step in served] == [2, 2, 2]
    assert {id(sequence) for step in served for sequence in step} == {id(sequence) for sequence in sequences}


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=60),
    st.integers(1, 30),
    st.integers(1, 64),
)
def test_a_prompt_cut_by_distinct_tokens_leaves_half_of_the_slots(prompt: list[int], slots: int, limit: int) -> None:
    scheduler = scheduler_of(max_tokens=limit, max_distinct=slots)
    scheduler.add(sequence_of(prompt))
    (chunk,) = scheduler.schedule()
    taken = min(len(prompt), limit)
    if len(set(prompt[:taken])) <= slots:
        assert chunk.count == taken
        return
    half = (slots + 1) // 2
    assert len(set(chunk.tokens)) == half, "slots - half are left for the next chunk's records"
    assert len({*chunk.tokens, prompt[chunk.end]}) > half, "the chunk could have been longer"


def test_a_preempted_sequence_does_not_get_its_blocks_back_in_the_same_step() -> None:
    scheduler = scheduler_of(blocks=4, max_tokens=4)
    old, young = sequence_of(range(7), 9, arrived=1), sequence_of(range(5), 9, arrived=2)
    load = Load(scheduler, 10, [], random.Random(0))
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.preemptions:
        chunks = scheduler.schedule()
        load.advance(chunks)
    assert [chunk.sequence for chunk in chunks] == [old]
    assert list(scheduler.waiting) == [young]
    assert scheduler.pool.free == 1, "there was a block for it"


def test_removing_frees_blocks_wherever_the_sequence_is() -> None:
    scheduler = scheduler_of(max_seqs=1)
    running, waiting = sequence_of(range(9)), sequence_of(range(9))
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    assert scheduler.pool.free < scheduler.pool.blocks
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert scheduler.pool.free == scheduler.pool.blocks
    assert scheduler.schedule() == []


@given(
    st.integers(1, 20),
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.booleans()), max_size=40),
)
def test_the_pool_hands_out_each_block_once(blocks: int, block_size: int, trace: list[tuple[int, int, bool]]) -> None:
    pool = BlockPool(blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(4)]
    for index, tokens, give_back in trace:
        table = tables[index]
        before = list(table)
        if give_back:
            pool.release(table)
            assert table == []
        else:
            more = max(0, -(-tokens // block_size) - len(before))
            assert pool.grow(table, tokens) == (more <= blocks - sum(map(len, tables)) + len(table) - len(before))
            assert table[: len(before)] == before, "a block that holds keys was moved"
            assert len(table) - len(before) in (0, more)
            assert len(table) * block_size >= tokens or table == before
        owned = [block for table in tables for block in table]
        assert sorted(owned) == sorted(set(owned))
        assert set(owned) <= set(range(blocks))
        assert pool.free == blocks - len(owned)
