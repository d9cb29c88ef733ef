"""Every policy does what its slow twin does."""

import random
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tol.policies import SlowContext, SlowLRU, SlowPinned, SlowS3FIFO
from tol.tables import make_table, open_pager
from tolserve.settings import PolicyName
from tolserve.tol.policy import NEED_FREQUENCIES, POLICIES, make_policy
from tolserve.tol.policy.base import Policy
from tolserve.tol.policy.context import Context
from tolserve.tol.replay import Trace, hit_rate, interleave

KEYS = 12
LISTED = [7, 3, 9, 1, 5, 0]
SLOTS = 8
# half-life and window are powers of two and small, so that sums are exact and windows overflow.
TWINS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "lru": (lambda: make_policy("lru", SLOTS), SlowLRU),
    "s3fifo": (lambda: make_policy("s3fifo", 20), lambda: SlowS3FIFO(20)),
    "static": (lambda: make_policy("static", 6, LISTED), lambda: SlowPinned(LISTED, lambda s: ceil(s / 16), 6)),
    "half-pinned": (
        lambda: make_policy("half-pinned", SLOTS, LISTED),
        lambda: SlowPinned(LISTED, lambda slots: ceil(slots / 2), SLOTS),
    ),
    "context": (lambda: Context(16, 4), lambda: SlowContext(16, 4)),
    "context, fast decay": (lambda: Context(0.0625, 3), lambda: SlowContext(0.0625, 3)),
}
steps = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "prefetch", "drop", "end", "ask", "resize", "recall"]),
        st.integers(0, 2),
        st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=6),  # more than a window
        st.sets(st.integers(0, KEYS - 1)),
    ),
    max_size=60,
)


class Both:
    """A policy and its twin in a tier of SLOTS at first, told the same; what they answer must be equal."""

    def __init__(self, name: str) -> None:
        self.policies = [make() for make in TWINS[name]]
        self.resident: set[int] = set()
        self.slots = SLOTS

    def tell(self, what: str, *arguments: Any) -> None:
        for policy in self.policies:
            getattr(policy, what)(*arguments)

    def victim(self, protected: set[int]) -> int | None:
        found = [policy.victim(lambda key: key not in protected) for policy in self.policies]
        assert found[0] == found[1]
        assert found[0] is not None or self.resident <= protected
        return found[0]

    def remove(self, key: int) -> None:
        self.tell("remove", key)
        self.resident.remove(key)

    def bring_in(self, key: int, protected: set[int]) -> None:
        if key in self.resident:
            return
        if len(self.resident) == self.slots:
            if (victim := self.victim(protected)) is None:
                return
            self.remove(victim)
        self.tell("insert", key)
        self.resident.add(key)

    def resize(self, slots: int) -> None:
        self.slots = slots
        self.tell("resize", slots)
        while len(self.resident) > slots:
            victim = self.victim(set())
            assert victim is not None
            self.remove(victim)

    def step(self, sequence: int, keys: list[int], protected: set[int]) -> None:
        self.tell("advance", sequence, keys)
        for key in dict.fromkeys(keys):
            self.bring_in(key, protected | set(keys))
            if key in self.resident:
                self.tell("touch", key)

    def check(self) -> None:
        orders = [list(policy.keys()) for policy in self.policies]
        assert orders[0] == orders[1]
        assert sorted(orders[0]) == sorted(self.resident)
        for last in (0, 1, 3, KEYS):
            assert self.policies[0].keys(last) == orders[1][max(0, len(orders[1]) - last) :]


@pytest.mark.parametrize("name", TWINS)
@given(steps)
def test_a_policy_against_its_slow_twin(name: str, trace: list[tuple[str, int, list[int], set[int]]]) -> None:
    both = Both(name)
    for action, sequence, keys, protected in trace:
        if action == "end":
            both.tell("end", sequence)
        elif action == "drop" and keys[0] in both.resident:
            both.remove(keys[0])
        elif action == "resize":
            both.resize(1 + len(protected))
        elif action == "ask":
            both.victim(protected)
        elif action == "prefetch":
            for key in keys:
                both.bring_in(key, protected)
        elif action == "recall":
            both.tell("recall", sequence, keys)
        elif action == "step":
            both.step(sequence, keys, protected)
        both.check()


def test_every_policy_has_a_twin() -> None:
    assert set(POLICIES) <= TWINS.keys()


def test_the_options_name_every_policy() -> None:
    assert get_args(PolicyName) == POLICIES


@pytest.mark.parametrize("name", NEED_FREQUENCIES)
def test_pinning_needs_a_list(name: str) -> None:
    with pytest.raises(ValueError, match="needs a frequency list"):
        make_policy(name, 4)


def test_a_smaller_tier_remembers_fewer_of_the_evicted() -> None:
    """A tenth of 20 slots is for newcomers, so 18 evicted ones are remembered; of one slot, none."""
    for slots, comes_back in ((20, [2, 1]), (1, [1, 2])):
        policy = make_policy("s3fifo", 20)
        policy.insert(1)
        policy.remove(1)
        policy.resize(slots)
        policy.insert(1)
        policy.insert(2)
        assert policy.keys() == comes_back


def test_a_context_keeps_its_order_over_any_time() -> None:
    """Its counts are scaled down before they overflow, and nothing else changes."""
    policy = Context(0.5, 2)
    for key in (1, 2, 3):
        policy.insert(key)
        policy.touch(key)
    for round_ in range(2000):
        policy.advance("s", (1 + round_ % 3,))
    assert list(policy.keys()) == [3, 1, 2]
    assert policy.victim(lambda key: True) == 3


@pytest.mark.parametrize("name", POLICIES)
def test_a_long_trace_against_the_slow_twin(name: str) -> None:
    """Long enough for tokens whose contexts are over to outweigh some that a context holds."""
    draw = random.Random(0)
    both = Both(name)
    for _ in range(400):
        keys = [min(draw.randrange(KEYS), draw.randrange(KEYS)) for _ in range(draw.randint(1, 3))]
        sequence = draw.randrange(3)
        if draw.random() < 0.2:
            both.tell("end", sequence)
        if draw.random() < 0.05:
            both.resize(draw.randint(3, SLOTS))
        if draw.random() < 0.3:
            both.bring_in(draw.randrange(KEYS), set())
        both.step(sequence, keys, set())
        both.victim({draw.randrange(KEYS)})
        both.check()


class Tier:
    """A tier whose policy is asked as tol/pager.py asks it, without the pager."""

    def __init__(self, policy: Policy, slots: int, spare: int) -> None:
        self.policy, self.slots, self.spare = policy, slots, spare
        self.resident: set[int] = set()

    def evict(self, kept: set[int]) -> None:
        victim = self.policy.victim(lambda key: key not in kept)
        assert victim is not None
        self.policy.remove(victim)
        self.resident.remove(victim)

    def step(self, sequence: int, tokens: list[int]) -> None:
        self.policy.advance(sequence, tokens)
        there = [token for token in tokens if token in self.resident]
        missing = [token for token in tokens if token not in self.resident]
        while len(self.resident) + len(missing) > self.slots:
            self.evict(set(tokens))
        for token in missing:
            self.policy.insert(token)
            self.resident.add(token)
        for token in there + missing:
            self.policy.touch(token)
        while len(self.resident) > self.slots - self.spare:
            self.evict(set())


@pytest.mark.parametrize("name", ["lru", "s3fifo", "context"])
def test_a_pager_asks_late_and_decides_the_same(name: str, tmp_path: Path) -> None:
    """What a step runs reaches the policy when its reads have started, but before a victim is named for it."""
    vocab_size, slots = 900, 512
    table, _ = make_table(tmp_path / "t", vocab_size)
    draw = random.Random(1)
    with open_pager(table, slots, policy=name) as (pager, _):
        (part,) = pager.parts
        assert part.spare == 2  # steps miss more than that now and then: victims are named in `acquire` too
        twin = Tier(make_policy(name, slots), slots, part.spare)
        for number in range(200):  # enough for windows to lose tokens
            sequence = draw.randrange(2)
            tokens = list(dict.fromkeys(int(vocab_size * draw.random() ** 2) for _ in range(60)))
            pager.advance(sequence, tokens)
            lease = pager.acquire(tokens)
            lease.wait()
            pager.release(lease)
            twin.step(sequence, tokens)
            assert part.slot_of.keys() == twin.resident, number
            if not draw.randrange(100):
                pager.end(sequence)
                twin.policy.end(sequence)


def test_a_pager_hits_what_a_replay_with_its_spare_slots_fewer_hits(tmp_path: Path) -> None:
    vocab_size, slots = 900, 512
    table, _ = make_table(tmp_path / "t", vocab_size)
    draw = random.Random(2)
    documents = [[int(vocab_size * draw.random() ** 2) for _ in range(draw.randint(1, 60))] for _ in range(200)]
    trace = Trace(np.concatenate(documents), np.cumsum([0, *map(len, documents)]), vocab_size)
    steps = replace(interleave(trace, 8), warmup=0)
    hits = 0
    with open_pager(table, slots) as (pager, _):
        for wanted in steps.distinct:
            lease = pager.acquire(wanted)
            hits += len(lease.hits)
            lease.wait()
            pager.release(lease)
        fewer = slots - pager.parts[0].spare
    assert fewer < slots
    assert hits / sum(map(len, steps.distinct)) == hit_rate(steps, fewer, make_policy("lru", fewer))
