"""Policies, the host tier and the device arena."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tol.tables import random_records
from tolserve.metrics import Metrics
from tolserve.tol.arena import DeviceArena
from tolserve.tol.host import HostTier
from tolserve.tol.policy import make_policy

operations = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "use", "remove", "victim"]), st.integers(0, 9), st.sets(st.integers(0, 9))
    ),
    max_size=60,
)


@given(operations)
def test_lru_against_a_list(trace: list[tuple[str, int, set[int]]]) -> None:
    policy = make_policy("lru", 10)
    order: list[int] = []  # oldest first
    for action, key, protected in trace:
        if action == "use":
            if key in order:
                policy.touch(key)
                order.remove(key)
            else:
                policy.insert(key)
            order.append(key)
        elif action == "remove" and key in order:
            policy.remove(key)
            order.remove(key)
        elif action == "victim":
            expected = [old for old in order if old not in protected]
            assert policy.victim(lambda old, protected=protected: old not in protected) == (expected or [None])[0]
        assert list(policy.keys()) == order


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown replacement policy 'random'; known: lru"):
        make_policy("random", 4)


host_operations = st.lists(
    st.tuples(st.sampled_from(["reserve", "arrive", "fail", "get"]), st.integers(0, 9)), max_size=60
)


@given(host_operations, st.integers(0, 5))
def test_the_host_tier_keeps_the_latest_records_within_its_size(trace: list[tuple[str, int]], slots: int) -> None:
    records = random_records(10, 32)
    evictions = Metrics().counter("evictions", "", ("tier",), [("host",)])
    tier = HostTier(slots, 32, make_policy("lru", slots), evictions, "cpu")
    order: list[int] = []  # keys that take a slot, oldest use first
    reserved: set[int] = set()
    evicted = 0
    for action, key in trace:
        if action == "reserve" and key not in order:
            place = tier.reserve(key)
            if len(order) == slots:
                victims = [old for old in order if old not in reserved]
                if not victims:
                    assert place is None
                    continue
                order.remove(victims[0])
                evicted += 1
            assert place is not None
            place[:] = records[key]
            order.append(key)
            reserved.add(key)
        elif action in ("arrive", "fail"):
            tier.settle(key, arrived=action == "arrive")
            if key in reserved and action == "fail":
                order.remove(key)
            reserved.discard(key)
        elif action == "get" and key in tier:
            assert np.array_equal(tier.lend(key), records[key])
            tier.give_back(key, None)
            order.remove(key)
            order.append(key)
        tier.check()
        assert {key for key in range(10) if key in tier} == set(order) - reserved
        assert (tier.used, tier.reserved) == (len(order), len(reserved))
        assert evictions.labels("host").value == evicted


def test_a_slot_of_the_arena_holds_one_record() -> None:
    arena = DeviceArena(4, 100, "cpu")
    assert arena.data.shape == (4, 112), "slots begin at multiples of 16 bytes"
    payload = random_records(1, 100)[0]
    before = arena.data.clone()
    assert arena.write(2, payload, arena.fence()) is None
    others = torch.arange(4) != 2
    assert torch.equal(arena.data[others], before[others])
    assert torch.equal(arena.data[2, 100:], before[2, 100:])
    assert np.array_equal(arena.data[2, :100].numpy(), payload)
    with pytest.raises(ValueError, match="broadcast"):
        arena.write(1, payload[:-1], None)


def test_an_arena_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="use cpu or cuda"):
        DeviceArena(4, 100, "meta")
