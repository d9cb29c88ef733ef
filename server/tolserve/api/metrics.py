"""Metric snapshots in Prometheus' text format."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from tolserve.metrics import Metric

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Snapshot(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Family]:
        families: dict[str, Metric] = {}
        for metric in self._metrics:
            if (known := families.get(metric.name)) is not None:
                metric = replace(known, samples=known.samples + metric.samples)
            families[metric.name] = metric
        return map(_family, families.values())


def _family(metric: Metric) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.label_names)
        bounds = [*map(repr, metric.bounds), "+Inf"]
        for sample in metric.samples:
            counts = accumulate(sample.buckets)
            histogram.add_metric(sample.labels, list(zip(bounds, counts, strict=True)), sample.value)
        return histogram
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.help, labels=metric.label_names)
    for sample in metric.samples:
        family.add_metric(sample.labels, sample.value)
    return family


def render(metrics: Iterable[Metric]) -> bytes:
    """The text that a scrape gets. Families of one name are one: the API and the engine both have their process's."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(metrics))
    return generate_latest(registry)
