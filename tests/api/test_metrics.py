"""Snapshots as Prometheus reads them."""

from prometheus_client.parser import text_string_to_metric_families

from tolserve.api.metrics import render
from tolserve.metrics import Metrics


def test_a_scrape_reads_back_what_was_counted() -> None:
    metrics = Metrics()
    hits = metrics.counter("hits_total", "Hits.", ("tier",), [("device",), ("host",)])
    slots = metrics.gauge("slots", "Slots.")
    seconds = metrics.histogram("wait_seconds", "Wait.", (0.1, 1.0))
    hits.add(3, "host")
    slots.set(7)
    for value in (0.05, 0.1, 0.5, 20):
        seconds.observe(value)
    text = render(metrics.snapshot()).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "tolserve_hits": "counter",
        "tolserve_slots": "gauge",
        "tolserve_wait_seconds": "histogram",
    }
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples == {
        ("tolserve_hits_total", "device"): 0,
        ("tolserve_hits_total", "host"): 3,
        ("tolserve_slots",): 7,
        ("tolserve_wait_seconds_bucket", "0.1"): 2,
        ("tolserve_wait_seconds_bucket", "1.0"): 3,
        ("tolserve_wait_seconds_bucket", "+Inf"): 4,
        ("tolserve_wait_seconds_count",): 4,
        ("tolserve_wait_seconds_sum",): 20.65,
    }


def test_a_family_that_two_processes_have_is_one() -> None:
    engine, api = Metrics(), Metrics()
    for metrics, kind, count in ((engine, "table", 2), (api, "dead", 3)):
        metrics.counter("failures_total", "Failures.", ("kind",)).add(count, kind)
    text = render([*engine.snapshot(), *api.snapshot()]).decode()
    assert text.count("# TYPE tolserve_failures_total counter") == 1
    (family,) = text_string_to_metric_families(text)
    assert {sample.labels["kind"]: sample.value for sample in family.samples} == {"table": 2, "dead": 3}
