"""Replay against slow, obvious simulations; frequency lists."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tol.policies import SlowLRU
from tolserve.tol.frequencies import FrequencyError, most_frequent, read_frequencies, write_frequencies
from tolserve.tol.policy import POLICIES, make_policy
from tolserve.tol.replay import Trace, TraceError, hit_rate, interleave, oracle_hit_rate, replay

documents = st.lists(st.lists(st.integers(0, 9), max_size=14), min_size=1, max_size=8).filter(any)


def trace_of(texts: list[list[int]]) -> Trace:
    return Trace(np.array([t for text in texts for t in text]), np.cumsum([0, *map(len, texts)]), 10)


def slow_steps(texts: list[list[int]], sequences: int) -> list[list[tuple[int, int]]]:
    """(document, token) of each step, by running the sequences one token at a time."""
    waiting = [number for number, text in enumerate(texts) if text]
    running: list[tuple[int, int] | None] = [None] * sequences
    steps = []
    while True:
        step = []
        for lane in range(sequences):
            if running[lane] is None and waiting:
                running[lane] = (waiting.pop(0), 0)
            if (now := running[lane]) is not None:
                document, at = now
                step.append((document, texts[document][at]))
                running[lane] = (document, at + 1) if at + 1 < len(texts[document]) else None
        if not step:
            return steps
        steps.append(step)


def slow_rate(wanted: list[set[int]], slots: int, oracle: bool) -> float:
    resident: list[int] = []  # the latest used last
    hits = lookups = 0
    for number, step in enumerate(wanted):
        if number >= len(wanted) // 2:
            hits += len(step & set(resident))
            lookups += len(step)
        for token in sorted(step - set(resident)):
            if len(resident) == slots:
                idle = [key for key in resident if key not in step]
                distance = {
                    key: next((n for n in range(number, len(wanted)) if key in wanted[n]), len(wanted)) for key in idle
                }
                resident.remove(max(idle, key=lambda key, far=distance: far[key]) if oracle else idle[0])
            resident.append(token)
        resident = [key for key in resident if key not in step] + [key for key in resident if key in step]
    return hits / lookups


@given(documents, st.integers(1, 4), st.integers(0, 6))
def test_lru_and_the_oracle_against_slow_simulations(texts: list[list[int]], sequences: int, more: int) -> None:
    expected = slow_steps(texts, sequences)
    steps = interleave(trace_of(texts), sequences)
    assert list(zip(steps.documents, steps.tokens, strict=True)) == [pair for step in expected for pair in step]
    wanted = [{token for _, token in step} for step in expected]
    assert [set(step) for step in steps.distinct] == wanted
    slots = steps.widest + more
    assert oracle_hit_rate(steps, slots) == slow_rate(wanted, slots, oracle=True)
    # Inside a step LRU's order is the tokens', so the simulation agrees where a step has one token.
    if sequences == 1:
        assert hit_rate(steps, slots, make_policy("lru", slots)) == slow_rate(wanted, slots, oracle=False)
    assert hit_rate(steps, slots, make_policy("lru", slots)) == hit_rate(steps, slots, SlowLRU())


@given(documents, st.integers(1, 4), st.integers(0, 6), st.sampled_from(POLICIES))
def test_no_policy_beats_the_oracle(texts: list[list[int]], sequences: int, more: int, name: str) -> None:
    steps = interleave(trace_of(texts), sequences)
    slots = steps.widest + more
    figures = replay(steps, sequences, slots, name, most_frequent(steps.counts()))
    assert (figures.policy, figures.slots, figures.sequences) == (name, slots, sequences)
    assert 0 <= figures.hit_rate <= 1
    # The optimum is one over all steps; over a part of them another order may do better.
    whole = dataclasses.replace(steps, warmup=0)
    assert oracle_hit_rate(whole, slots) >= hit_rate(whole, slots, make_policy(name, slots, list(range(10))))


def test_a_cache_smaller_than_a_step_is_refused() -> None:
    steps = interleave(trace_of([[1, 2], [3, 4], [5, 6]]), 3)
    with pytest.raises(TraceError, match="2 slots do not hold the 3 records"):
        hit_rate(steps, 2, make_policy("lru", 2))
    with pytest.raises(TraceError, match="2 slots do not hold the 3 records"):
        oracle_hit_rate(steps, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offsets": [0, 2, 1, 3]}, "offsets must rise"),
        ({"offsets": [0, 2]}, "offsets must rise"),
        ({"tokens": [1, 2, 10]}, "below the vocabulary's size, 10"),
        ({"tokens": []}, "at least one token"),
        ({"vocab_size": "ten"}, "no trace"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "trace.npz"
    good = {"tokens": [1, 2, 3], "offsets": [0, 1, 3], "vocab_size": 10}
    np.savez(path, **good)
    assert Trace.load(path).documents([1]).tokens.tolist() == [2, 3]
    np.savez(path, **(good | change))
    with pytest.raises(TraceError, match=words):
        Trace.load(path)


def test_a_frequency_list_comes_back_and_fits_its_vocabulary_alone(tmp_path: Path) -> None:
    path = tmp_path / "list.npz"
    write_frequencies(path, np.array([2, 0, 5, 2]))
    assert most_frequent(read_frequencies(path, 4)) == [2, 0, 3]
    with pytest.raises(FrequencyError, match="4 tokens; this one has 5"):
        read_frequencies(path, 5)
    path.write_text("{}")
    with pytest.raises(FrequencyError, match="no frequency list"):
        read_frequencies(path, 4)
