"""Demand on the tiers: by replay as the pager counts it, and estimated close to the replay of independent tokens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tol.policies import SlowLRU
from tol.tables import make_table, open_pager, value
from tol.test_replay import documents, slow_steps, trace_of
from tolserve.tol.estimate import FromCounts, FromTrace, independent, replayed, zipf
from tolserve.tol.part import SPARE_SHARE
from tolserve.tol.policy import POLICIES
from tolserve.tol.replay import HostTier, Trace, TraceError, interleave, misses
from tolserve.tol.table import Table


def slow_misses(wanted: list[list[int]], slots: int, host_slots: int) -> list[tuple[int, int]]:
    """(served by the host tier, read from disk) of each step, by lists in order of use."""
    device: list[int] = []
    host: list[int] = []
    counts = []
    for step in wanted:
        hits = [token for token in step if token in device]
        device = [token for token in device if token not in hits] + hits
        reading: list[int] = []
        near = 0
        for token in step:
            if token in hits:
                continue
            if len(device) == slots:
                device.remove(next(key for key in device if key not in step))
            device.append(token)
            if token in host:
                near += 1
                host.remove(token)
                host.append(token)
            elif len(host) < host_slots or any(key not in reading for key in host):
                if len(host) == host_slots:
                    host.remove(next(key for key in host if key not in reading))
                host.append(token)
                reading.append(token)
        counts.append((near, len(step) - len(hits) - near))
    return counts


@settings(max_examples=300)
@given(documents, st.integers(1, 4), st.integers(0, 2), st.integers(0, 4))
def test_two_tiers_against_a_slow_simulation(texts: list[list[int]], sequences: int, more: int, host: int) -> None:
    steps = replace(interleave(trace_of(texts), sequences), warmup=0)
    slots = steps.widest + more
    counts = misses(steps, slots, SlowLRU(), HostTier(host, SlowLRU()))
    expected = slow_misses([list(dict.fromkeys(t for _, t in s)) for s in slow_steps(texts, sequences)], slots, host)
    assert [tuple(row) for row in counts.tolist()] == expected


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("plan") / "table", vocab_size=900)[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("slots", "host_slots"), [(12, 0), (12, 3), (12, 30), (300, 40), (30, 900)])
def test_the_replay_counts_what_the_pager_counts(table: Table, policy: str, slots: int, host_slots: int) -> None:
    weights = zipf(900)
    tokens = np.random.default_rng(5).choice(900, 4000, p=weights / weights.sum())
    steps = interleave(Trace(tokens, np.arange(0, 4001, 80), 900), 4)
    frequent = list(range(1, 900))
    expected = replayed(steps, slots - slots // SPARE_SHARE, policy, host_slots, frequent)
    assert expected is not None
    with open_pager(table, slots, host_slots, policy=policy, frequent=frequent) as (pager, metrics):

        def counts() -> np.ndarray:
            names = [("tol_lookups_total",), ("tol_misses_total", "host"), ("tol_misses_total", "disk")]
            return np.array([value(metrics, *name) for name in names])

        for step, wanted in enumerate(steps.distinct):
            if step == steps.warmup:
                before = counts()
            for at in range(steps.bounds[step], steps.bounds[step + 1]):
                pager.advance(steps.documents[at], (steps.tokens[at],))
            lease = pager.acquire(wanted)
            lease.wait()
            pager.release(lease)
            for document in steps.ends.get(step, ()):
                pager.end(document)
        found = (counts() - before) / (len(steps) - steps.warmup)
    # The pager tells its policies of a step's uses when the step is over; all but lru may decide otherwise for that.
    error = 1e-9 if policy == "lru" else 0.05
    assert found == pytest.approx([expected.lookups, expected.host, expected.disk], rel=error)
    assert expected.hit_rate == pytest.approx(1 - found[1:].sum() / found[0], rel=error)
    assert expected.reads @ np.arange(len(expected.reads)) == pytest.approx(expected.disk)
    assert expected.reads.sum() == pytest.approx(1)


@pytest.mark.parametrize("policy", ["lru", "static", "half-pinned"])
@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize(("slots", "host_slots"), [(100, 0), (100, 250), (200, 300)])
def test_the_estimate_of_independent_tokens(policy: str, sequences: int, slots: int, host_slots: int) -> None:
    weights = zipf(1000)
    tokens = np.random.default_rng(2).choice(1000, 80_000, p=weights / weights.sum())
    steps = interleave(Trace(tokens, np.arange(0, 80_001, 2500), 1000), sequences)
    found = replayed(steps, slots, policy, host_slots, list(range(1000)))
    guess = independent(weights, sequences, slots, policy, host_slots)
    assert found is not None
    assert guess is not None
    assert guess.lookups == pytest.approx(found.lookups, rel=0.01)
    assert guess.hit_rate == pytest.approx(found.hit_rate, abs=0.01)
    assert guess.disk == pytest.approx(found.disk, rel=0.1)
    assert guess.reads[0] == pytest.approx(found.reads[0], abs=0.03)
    assert guess.reads @ np.arange(len(guess.reads)) == pytest.approx(guess.disk)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=60).filter(any), st.integers(1, 40), st.integers(0, 70))
def test_an_estimate_never_leaves_its_bounds(counts: list[int], sequences: int, slots: int) -> None:
    for policy in ("lru", "static", "half-pinned"):
        guess = independent(np.array(counts, np.float64), sequences, slots, policy, host_slots=slots // 2)
        assert (guess is None) == (slots < min(sequences, np.count_nonzero(counts)))
        if guess is not None:
            assert 0 < guess.lookups <= sequences + 1e-9
            assert guess.host >= -1e-9
            assert guess.disk >= -1e-9
            assert -1e-9 <= guess.hit_rate <= 1
            if slots >= np.count_nonzero(counts):
                assert guess.hit_rate == pytest.approx(1)
            assert guess.reads.sum() == pytest.approx(1)


def test_thousands_of_sequences_have_an_estimate() -> None:
    guess = independent(zipf(8000), 4096, 6000, "lru")
    assert guess is not None
    shares = guess.reads
    assert len(shares) == 4097
    assert shares.sum() == pytest.approx(1)
    assert shares @ np.arange(4097) == pytest.approx(guess.disk)


def test_all_records_are_hits_in_a_cache_of_all_records() -> None:
    steps = interleave(trace_of([[1, 2, 3], [4, 5, 9]]), 2)
    for demand in (replayed(steps, 10, "lru"), independent(zipf(10), 2, 10, "lru")):
        assert demand is not None
        assert (demand.hit_rate, demand.reads.tolist()) == (1.0, [1.0])


def test_a_cache_smaller_than_a_step_has_no_figures() -> None:
    assert replayed(interleave(trace_of([[1], [2], [3]]), 3), 2, "lru") is None
    assert independent(zipf(10), 3, 2, "lru") is None


def test_a_part_of_a_trace_is_spread_over_it() -> None:
    trace = Trace(np.repeat(np.arange(20), 10), np.arange(0, 201, 10), 20)
    part = trace.sample(55)
    assert part.tokens.tolist() == np.repeat([0, 4, 8, 12, 16], 10).tolist()
    assert part.offsets.tolist() == [0, 10, 20, 30, 40, 50]
    one_document = Trace(trace.tokens, np.array([0, 200]), 20)
    assert one_document.sample(55).offsets.tolist() == [0, 55]
    assert trace.sample(200) is trace


def test_a_trace_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(TraceError, match="vocabulary of 10 tokens, the model has 300"):
        FromTrace(trace_of([[1, 2]]), 300, "lru", 0, None)


def test_each_source_says_what_it_is() -> None:
    assert "Zipf" in FromCounts(None, 10, "lru", 0).note
    assert "context has none" in FromCounts(np.ones(10, np.int64), 10, "context", 0).note
    assert "repeat themselves" in FromCounts(np.ones(10, np.int64), 10, "static", 0).note
    trace = trace_of([[1, 2], [3, 4]])
    assert "counts of the first half" in FromTrace(trace, 10, "static", 0, None).note
    assert "lru replayed over 4 of the trace's 4 tokens, " in FromTrace(trace, 10, "lru", 0, None).note
