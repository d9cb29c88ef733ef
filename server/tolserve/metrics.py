"""Counted numbers and their shape on the wire.

Each metric is declared beside the code it measures, on the `Metrics` of its process. The engine sends cumulative
snapshots; the API renders the last one it got, so `/metrics` answers when the engine is gone. Nothing here imports
prometheus_client: the engine runs without it.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

PREFIX = "tolserve_"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass
class Sample:
    """One labelled series. `value` is a counter's or gauge's value, or a histogram's sum; `buckets` are a histogram's
    counts per bucket (not cumulative), the last one for observations above every bound."""

    labels: tuple[str, ...]
    value: float = 0.0
    buckets: list[int] = field(default_factory=list)


@dataclass
class Metric:
    """A named family of series. Counters only grow; `name` is complete, prefix and `_total` included."""

    name: str
    kind: Kind
    help: str
    label_names: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    samples: list[Sample] = field(default_factory=list)

    def labels(self, *values: str) -> Sample:
        """The series with these label values, made at its first use. Keep the values bounded."""
        for sample in self.samples:
            if sample.labels == values:
                return sample
        if len(values) != len(self.label_names):
            raise ValueError(f"{self.name} has labels {self.label_names}, got {values}")
        sample = Sample(values, buckets=[0] * (len(self.bounds) + 1) if self.kind == "histogram" else [])
        self.samples.append(sample)
        return sample

    def add(self, amount: float, *values: str) -> None:
        self.labels(*values).value += amount

    def set(self, value: float, *values: str) -> None:
        self.labels(*values).value = value

    def observe(self, value: float, *values: str, times: int = 1) -> None:
        sample = self.labels(*values)
        sample.value += value * times
        sample.buckets[bisect_left(self.bounds, value)] += times


class Metrics:
    """The metrics of one process, in the order of their declaration."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def _declare(self, metric: Metric, series: Sequence[tuple[str, ...]]) -> Metric:
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name} is declared twice")
        self._metrics[metric.name] = metric
        for values in series or ([()] if not metric.label_names else []):
            metric.labels(*values)
        return metric

    def counter(
        self, name: str, help: str, labels: tuple[str, ...] = (), series: Sequence[tuple[str, ...]] = ()
    ) -> Metric:
        """`series` lists label values that must show as 0 before they first happen."""
        return self._declare(Metric(PREFIX + name, "counter", help, labels), series)

    def gauge(
        self, name: str, help: str, labels: tuple[str, ...] = (), series: Sequence[tuple[str, ...]] = ()
    ) -> Metric:
        return self._declare(Metric(PREFIX + name, "gauge", help, labels), series)

    def histogram(
        self,
        name: str,
        help: str,
        bounds: tuple[float, ...],
        labels: tuple[str, ...] = (),
        series: Sequence[tuple[str, ...]] = (),
    ) -> Metric:
        return self._declare(Metric(PREFIX + name, "histogram", help, labels, bounds), series)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What happens inside leaves counters and histograms as they were; gauges keep what they became."""
        before = {metric.name: _copy(metric) for metric in self._metrics.values() if metric.kind != "gauge"}
        try:
            yield
        finally:
            for name, old in before.items():
                for sample in self._metrics[name].samples:
                    was = old.labels(*sample.labels)
                    sample.value, sample.buckets = was.value, was.buckets

    def snapshot(self) -> list[Metric]:
        """All families with their current values; cumulative, to be encoded and sent."""
        return list(self._metrics.values())


def merge(past: Sequence[Metric], now: Sequence[Metric]) -> list[Metric]:
    """The numbers of a process and of those before it: counters and histograms are summed series by series, gauges are
    `now`'s, and 0 where `now` has none. Both sides stay as they are.

    Raises ValueError for a histogram with other bounds on either side.
    """
    merged = {metric.name: _copy(metric) for metric in past}
    for metric in merged.values():
        if metric.kind == "gauge":
            for sample in metric.samples:
                sample.value = 0.0
    for metric in now:
        if (total := merged.setdefault(metric.name, replace(metric, samples=[]))).bounds != metric.bounds:
            raise ValueError(f"{metric.name} has bounds {metric.bounds} and {total.bounds}")
        for sample in metric.samples:
            series = total.labels(*sample.labels)
            series.value += sample.value
            series.buckets = [a + b for a, b in zip(series.buckets, sample.buckets, strict=True)]
    return list(merged.values())


def _copy(metric: Metric) -> Metric:
    return replace(metric, samples=[replace(sample, buckets=list(sample.buckets)) for sample in metric.samples])


class ProcessGauges:
    """What a process itself takes: memory, file descriptors, threads, read from Linux's /proc at each refresh.

    The API and the engine declare the same names and differ in the label.
    """

    def __init__(self, metrics: Metrics, process: str) -> None:
        self._series = (process,)
        self._memory = metrics.gauge("resident_memory_bytes", "Resident memory of a process.", ("process",))
        self._fds = metrics.gauge("open_fds", "Open file descriptors of a process.", ("process",))
        self._threads = metrics.gauge("threads", "Threads of a process.", ("process",))

    def refresh(self) -> None:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        self._memory.set(pages * os.sysconf("SC_PAGE_SIZE"), *self._series)
        self._fds.set(len(os.listdir("/proc/self/fd")), *self._series)
        self._threads.set(len(os.listdir("/proc/self/task")), *self._series)
