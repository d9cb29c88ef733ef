"""The paging core's metrics. One lookup is one distinct token of one step: lookups == hits + sum of misses, always."""

from tolserve.metrics import Metrics
from tolserve.tol.table import ERROR_KINDS

# From a 4 KiB copy inside RAM (about a microsecond) to a disk that takes a second for a record.
FILL_BOUNDS = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
SOURCES = ("host", "disk")
CAUSES = ("demand", "prefetch", "preload")
TIERS = ("device", "host")


class Counters:
    """Declared once per process; changed by the engine thread alone."""

    def __init__(self, metrics: Metrics) -> None:
        sources = [(source,) for source in SOURCES]
        tiers = [(tier,) for tier in TIERS]
        self.lookups = metrics.counter("tol_lookups_total", "Distinct token ids that steps asked for.")
        self.hits = metrics.counter("tol_hits_total", "Lookups whose record was in the device tier.")
        self.misses = metrics.counter(
            "tol_misses_total",
            "Lookups whose record was elsewhere: in host memory, on disk, or on its way (inflight).",
            ("source",),
            [*sources, ("inflight",)],
        )
        self.fills = metrics.counter(
            "tol_fills_total",
            "Records that arrived in the device tier, by where from and what for.",
            ("source", "cause"),
            [(source, cause) for source in SOURCES for cause in CAUSES],
        )
        self.evictions = metrics.counter("tol_evictions_total", "Records evicted from a tier.", ("tier",), tiers)
        self.read_bytes = metrics.counter(
            "tol_read_bytes_total", "Bytes moved to fill the device tier; from disk whole pages.", ("source",), sources
        )
        self.fill_seconds = metrics.histogram(
            "tol_fill_seconds",
            "Time to read, check and copy one record, queue excluded.",
            FILL_BOUNDS,
            ("source",),
            sources,
        )
        self.stall_seconds = metrics.counter("tol_stall_seconds_total", "Time that steps waited for rows.")
        self.stalled_steps = metrics.counter("tol_stalled_steps_total", "Steps that waited for rows.")
        self.slots = metrics.gauge("tol_slots", "Records a tier can hold.", ("tier",), tiers)
        self.record_bytes = metrics.gauge(
            "tol_record_bytes", "Bytes of one record without padding; a tier's bytes are its slots times this."
        )
        self.slots_used = metrics.gauge("tol_slots_used", "Records in a tier or arriving.", ("tier",), tiers)
        self.slots_pinned = metrics.gauge(
            "tol_slots_pinned",
            "Device: records protected by a step. Host: records protected while they are read.",
            ("tier",),
            tiers,
        )
        self.read_errors = metrics.counter(
            "tol_read_errors_total",
            "Attempts to read a record that failed, those that a second attempt made good included.",
            ("kind",),
            [(kind,) for kind in ERROR_KINDS],
        )
