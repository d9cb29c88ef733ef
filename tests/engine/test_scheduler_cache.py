"""Scheduling with the cache in view: what is missing delays decodes by a bounded amount, and nobody starves."""

import random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.test_scheduler import Load, scheduler_of, sequence_of
from tolserve.engine.blocks import BlockPool
from tolserve.engine.scheduler import MAX_PASSES, Scheduler
from tolserve.engine.sequence import Chunk, Sequence

VOCAB = 24
LONGEST = 44  # prompt and answer, in tokens: 11 blocks


class Traffic(RuleBasedStateMachine):
    """Arrivals, aborts and a changing cache around one scheduler; each step is checked against the state before it."""

    @initialize(
        blocks=st.integers(11, 40),
        max_seqs=st.integers(1, 5),
        max_tokens=st.sampled_from([1, 3, 8, 64]),
        max_distinct=st.sampled_from([1, 4, 12, VOCAB]),
        max_fills=st.integers(1, 6),
    )
    def start(self, blocks: int, max_seqs: int, max_tokens: int, max_distinct: int, max_fills: int) -> None:
        self.there: set[int] = set()
        self.scheduler = Scheduler(
            BlockPool(blocks, 4),
            max_seqs=max_seqs,
            max_tokens=max_tokens,
            max_distinct=max_distinct,
            present=self.there.__contains__,
            max_fills=max_fills,
        )
        self.load = Load(self.scheduler, VOCAB, [], random.Random(0))
        self.clock = 0.0
        self.hits = 0
        self.passes: dict[int, int] = {}  # id(sequence) -> admissions of others from behind it
        self.all: list[Sequence] = []  # keeps ids unique

    def add(self, sequence: Sequence) -> None:
        self.all.append(sequence)
        self.scheduler.add(sequence)

    @rule(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), max_tokens=st.integers(0, 14))
    def arrive(self, prompt: list[int], max_tokens: int) -> None:
        self.clock += 1
        self.add(sequence_of(prompt, max_tokens, arrived=self.clock))

    @precondition(lambda self: self.all)
    @rule(dice=st.randoms(use_true_random=False), salt=st.sampled_from([None, None, "a"]), scored=st.booleans())
    def go_on(self, dice: random.Random, salt: str | None, scored: bool) -> None:
        """Somebody sends again what was sent, or what came of it, with something behind it."""
        self.clock += 1
        text = dice.choice(self.all).tokens[: dice.randint(1, 30)]
        self.add(sequence_of([*text, 0][:30], dice.randrange(14), self.clock, salt, scored))

    @rule()
    def exchange_table(self) -> None:
        self.load.exchange_table()

    @rule()
    def fail(self) -> None:
        self.load.fail(self.scheduler.schedule())

    @rule(there=st.sets(st.integers(0, VOCAB - 1)))
    def change_cache(self, there: set[int]) -> None:
        self.there.clear()
        self.there |= there

    @precondition(lambda self: any(self.scheduler.sequences()))
    @rule(dice=st.randoms(use_true_random=False))
    def abort(self, dice: random.Random) -> None:
        self.scheduler.remove(dice.choice(list(self.scheduler.sequences())))

    @rule(steps=st.integers(1, 4))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> list[Chunk]:
        scheduler = self.scheduler
        waiting = list(scheduler.waiting)
        decoded = {id(sequence): sequence.decodes for sequence in scheduler.running}
        decodes = [sequence for sequence in scheduler.running if sequence.decodes]
        preemptions = scheduler.preemptions
        chunks = scheduler.schedule()
        assert bool(chunks) == any(scheduler.sequences())
        self.load.check(chunks, decoded)
        admitted = [chunk.sequence for chunk in chunks if id(chunk.sequence) not in decoded]
        self.check_passes(waiting, admitted)
        self.check_fills(chunks)
        fit = len(decodes) <= scheduler.max_tokens and len({s.tokens[-1] for s in decodes}) <= (
            scheduler.max_distinct or VOCAB
        )
        if fit and scheduler.preemptions == preemptions:
            assert {id(s) for s in decodes} <= {id(chunk.sequence) for chunk in chunks}, "a decode was left out"
        self.load.advance(chunks)
        return chunks

    def check_passes(self, waiting: list[Sequence], admitted: list[Sequence]) -> None:
        for sequence in admitted:
            for passed in waiting[: waiting.index(sequence)]:
                self.passes[id(passed)] = self.passes.get(id(passed), 0) + 1
                assert self.passes[id(passed)] <= MAX_PASSES
                assert not passed.generated, "it was preempted and passed over then"
            waiting.remove(sequence)

    def check_fills(self, chunks: list[Chunk]) -> None:
        """Where a sequence decodes, prompts cause no more fills than the budget."""
        decodes = [c for c in chunks if c.sequence.pending == 1 and c.sequence.generated]
        decoding = {token for chunk in decodes for token in chunk.tokens}
        prompts = {token for chunk in chunks if chunk not in decodes for token in chunk.tokens}
        if decodes:
            assert len(prompts - decoding - self.there) <= self.scheduler.max_fills

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.load.check_blocks()

    def teardown(self) -> None:
        """Whatever is there, all come to their end, in no more steps than if each token had one of its own."""
        left = list(self.scheduler.sequences())
        work = sum(len(s.tokens) + s.request.sampling.max_tokens + 1 for s in left)
        for _ in range(100 + 30 * work):
            if not any(self.scheduler.sequences()):
                break
            self.step()
        assert not list(self.scheduler.sequences())
        assert self.scheduler.pool.free == self.scheduler.pool.blocks
        assert all(s.generated >= s.request.sampling.max_tokens for s in left)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=30)


def decoding(scheduler: Scheduler, token: int = 0) -> Sequence:
    """A sequence that decodes from now on."""
    sequence = sequence_of([token], 1000)
    scheduler.add(sequence)
    advance(scheduler.schedule(), token)
    return sequence


def advance(chunks: list[Chunk], token: int = 0) -> None:
    for chunk in chunks:
        chunk.sequence.computed = chunk.end
        if chunk.samples:
            chunk.sequence.tokens.append(token)


def test_a_cold_prompt_is_cut_only_where_others_decode() -> None:
    there = {0}
    for others in (False, True):
        scheduler = scheduler_of(max_distinct=100, present=there.__contains__, max_fills=5)
        if others:
            decoding(scheduler)
        cold = sequence_of([0, 0, *range(1, 30)])
        scheduler.add(cold)
        chunk = next(chunk for chunk in scheduler.schedule() if chunk.sequence is cold)
        assert chunk.count == (7 if others else 31)


def test_prompts_share_the_budget_and_decodes_do_not_use_it() -> None:
    scheduler = scheduler_of(max_seqs=11, max_distinct=100, present=lambda token: False, max_fills=5)
    decodes = [decoding(scheduler) for _ in range(8)]
    for token, sequence in enumerate(decodes, 50):
        sequence.tokens[-1] = token
    first, second, third = (sequence_of(range(start, start + 3)) for start in (0, 10, 50))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    counts = {id(chunk.sequence): chunk.count for chunk in scheduler.schedule()}
    assert [counts.get(id(s), 0) for s in decodes] == [1] * 8
    assert [counts.get(id(s), 0) for s in (first, second, third)] == [3, 2, 3], "the third asks for records of decodes"


def test_the_last_token_of_a_prompt_that_was_sent_before_is_still_a_prompts() -> None:
    """All but one of their tokens are known: each would miss one record."""
    scheduler = scheduler_of(max_distinct=100, present={0, 99}.__contains__, max_fills=2)
    texts = [[0, 0, 0, 0, token] for token in range(10, 15)]
    first = sequence_of([0, 0, 0, 0, 0], 1)
    scheduler.add(first)
    for chunk in scheduler.schedule():
        scheduler.ran(chunk)
    scheduler.remove(first)
    again = [sequence_of(text) for text in texts]
    for others in (False, True):
        if others:
            decoding(scheduler, 99)
        for sequence in again:
            scheduler.add(sequence)
        starts = [chunk.start for chunk in scheduler.schedule() if chunk.sequence in again]
        assert starts == [4] * (2 if others else 5)
        for sequence in again:
            scheduler.remove(sequence)
            sequence.start_over()


def test_records_that_a_step_reads_anyway_cost_nothing() -> None:
    scheduler = scheduler_of(max_distinct=100, present=lambda token: False, max_fills=1)
    decoding(scheduler, 7)
    prompt = sequence_of([7, 7, 3, 7, 3, 4])
    scheduler.add(prompt)
    assert [chunk.count for chunk in scheduler.schedule()] == [1, 5]


def test_who_has_its_records_goes_first_until_another_was_passed_over_often_enough() -> None:
    there = {1, 2}
    scheduler = scheduler_of(max_seqs=2, max_distinct=100, present=there.__contains__, max_fills=3)
    decoding(scheduler)
    cold = sequence_of(range(10, 30), 1)
    scheduler.add(cold)
    order = []
    for _ in range(MAX_PASSES + 2):
        scheduler.add(sequence_of([1, 2], 1))
        (admitted,) = [chunk for chunk in scheduler.schedule() if not chunk.sequence.computed]
        order.append(admitted.sequence is cold)
        assert admitted.count == (3 if order[-1] else 2), "the cold one is cut, and goes on later"
        advance([admitted])
        scheduler.remove(admitted.sequence)
    assert order == [False] * MAX_PASSES + [True, False]
    assert scheduler.overtakes == MAX_PASSES


def test_without_a_table_the_order_is_that_of_arrival() -> None:
    scheduler = scheduler_of(max_seqs=1)
    sequences = [sequence_of(range(3 * i, 3 * i + 3)) for i in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    served = []
    while any(scheduler.sequences()):
        (chunk,) = scheduler.schedule()
        served.append(chunk.sequence)
        scheduler.remove(chunk.sequence)
    assert served == sequences
    assert not scheduler.overtakes


def test_a_preempted_one_is_not_passed_over() -> None:
    there = {0, 1}
    cache: dict[str, Any] = {"present": there.__contains__, "max_fills": 2, "prefix_cache": False}
    scheduler = scheduler_of(blocks=4, max_distinct=100, **cache)
    old, young = sequence_of([0] * 7, 9, arrived=1), sequence_of([0, 0, 5, 6, 7], 9, arrived=2)
    load = Load(scheduler, 1, [], random.Random(0))
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.preemptions:
        load.advance(scheduler.schedule())
    scheduler.add(sequence_of([1], 1, arrived=3))
    load.advance(scheduler.schedule())
    assert [s.arrived for s in scheduler.waiting] == [3], "its record is there, but the block is the older one's"
