"""Numbers that outlive the process that counted them, and a warm-up that leaves none."""

from copy import deepcopy
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolserve.metrics import Metric, Metrics, merge

# What may happen to a process: (metric, label, amount), whole numbers so that sums are exact.
events = st.lists(
    st.tuples(st.sampled_from(["counter", "gauge", "histogram"]), st.sampled_from("ab"), st.integers(0, 9)), max_size=8
)
lives = st.lists(events, min_size=1, max_size=4)


def declare() -> Metrics:
    metrics = Metrics()
    metrics.counter("counter", "C.", ("which",), [("a",)])
    metrics.gauge("gauge", "G.", ("which",))
    metrics.histogram("histogram", "H.", (2.0, 5.0), ("which",))
    return metrics


def happen(metrics: Metrics, event: tuple[str, str, int]) -> None:
    name, label, amount = event
    (metric,) = (m for m in metrics.snapshot() if m.kind == name)
    act = {"counter": metric.add, "gauge": metric.set, "histogram": metric.observe}[name]
    act(amount, label)


def series(metrics: list[Metric], *kinds: str) -> dict[tuple[str, ...], tuple[float, ...]]:
    return {(m.name, *s.labels): (s.value, *s.buckets) for m in metrics if m.kind in kinds for s in m.samples}


@given(lives)
def test_counters_go_on_where_the_last_process_stopped_and_gauges_do_not(
    lives: list[list[tuple[str, str, int]]],
) -> None:
    """Scraped after every event, and between two processes, nothing that only grows ever fell; in the end everything is
    as if one process had counted it all."""
    whole, past, shown = declare(), [], [{}]
    for life in lives:
        process = declare()
        for event in life:
            happen(process, event)
            happen(whole, event)
            shown.append(series(merge(past, process.snapshot()), "counter", "histogram"))
        last = merge(past, process.snapshot())
        assert series(last, "gauge").items() >= series(process.snapshot(), "gauge").items()
        past = merge(past, process.snapshot())
        dead = merge(past, [])
        shown.append(series(dead, "counter", "histogram"))
        assert all(value == (0.0,) for value in series(dead, "gauge").values())
        assert series(dead, "gauge").keys() == series(last, "gauge").keys()
    assert shown[-1] == series(whole.snapshot(), "counter", "histogram")
    for earlier, later in pairwise(shown):
        for name, numbers in earlier.items():
            assert all(after >= before for before, after in zip(numbers, later[name], strict=True))


@given(events, events)
def test_merging_changes_neither_side(first: list[tuple[str, str, int]], second: list[tuple[str, str, int]]) -> None:
    sides = [declare(), declare()]
    for metrics, happened in zip(sides, (first, second), strict=True):
        for event in happened:
            happen(metrics, event)
    before = deepcopy([metrics.snapshot() for metrics in sides])
    merged = merge(*(metrics.snapshot() for metrics in sides))
    for metric in merged:
        for sample in metric.samples:
            sample.value += 1
            sample.buckets = [count + 1 for count in sample.buckets]
    assert [metrics.snapshot() for metrics in sides] == before


def test_histograms_of_different_bounds_are_not_added() -> None:
    one, other = Metrics(), Metrics()
    one.histogram("h", "H.", (1.0,))
    other.histogram("h", "H.", (2.0,))
    with pytest.raises(ValueError, match="h has bounds"):
        merge(one.snapshot(), other.snapshot())


@given(events, events)
def test_what_happens_uncounted_shows_in_gauges_alone(
    before: list[tuple[str, str, int]], inside: list[tuple[str, str, int]]
) -> None:
    metrics, expected = declare(), declare()
    for event in before:
        happen(metrics, event)
        happen(expected, event)
    with metrics.uncounted():
        for event in inside:
            happen(metrics, event)
    for event in (event for event in inside if event[0] == "gauge"):
        happen(expected, event)
    counted = series(metrics.snapshot(), "counter", "histogram")
    known = series(expected.snapshot(), "counter", "histogram")
    assert counted.items() >= known.items()
    assert not any(value for name in counted.keys() - known.keys() for value in counted[name])  # new series are at 0
    assert series(metrics.snapshot(), "gauge") == series(expected.snapshot(), "gauge")


def test_observing_several_at_once_is_observing_each() -> None:
    metrics = Metrics()
    one, many = (metrics.histogram(name, "", (1.0, 2.0)) for name in ("one", "many"))
    for value, times in ((0.5, 3), (2.0, 1), (9.0, 2)):
        many.observe(value, times=times)
        for _ in range(times):
            one.observe(value)
    assert many.samples == one.samples
