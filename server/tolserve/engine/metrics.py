"""What the engine counts about requests and steps; the table's own numbers are declared in tol/."""

import time
from collections.abc import Iterable

from tolserve.engine.request import FinishReason
from tolserve.engine.scheduler import Scheduler
from tolserve.engine.sequence import Sequence
from tolserve.metrics import Metrics, ProcessGauges

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)


class EngineMetrics:
    """Names, units and meanings are vLLM's under our prefix, so that dashboards carry over."""

    def __init__(self, metrics: Metrics) -> None:
        self.running = metrics.gauge("num_requests_running", "Requests in the batch")
        self.waiting = metrics.gauge("num_requests_waiting", "Requests in the queue")
        self.kv_usage = metrics.gauge("kv_cache_usage_perc", "Share of KV blocks in use, 1 is all")
        self.preemptions = metrics.counter("num_preemptions_total", "Requests that gave their KV blocks back")
        self.overtakes = metrics.counter(
            "num_overtakes_total", "Requests that started before earlier ones whose records were not there"
        )
        self.sat_out = metrics.counter(
            "num_sat_out_total", "Times a request let a step pass while its record came from disk"
        )
        self.prefix_queries = metrics.counter(
            "prefix_cache_queries_total", "Tokens of prompts that were looked up in the prefix cache"
        )
        self.prefix_hits = metrics.counter(
            "prefix_cache_hits_total", "Of these, tokens whose keys and values were there"
        )
        self.prompt_tokens = metrics.counter("prompt_tokens_total", "Prompt tokens of requests that got an answer")
        self.generation_tokens = metrics.counter("generation_tokens_total", "Tokens generated")
        self.success = metrics.counter(
            "request_success_total", "Requests finished", ("finished_reason",), [("stop",), ("length",)]
        )
        # Those that an engine takes along with it are counted by its client.
        self.failed = metrics.counter("request_failure_total", "Requests failed", ("kind",), [("table",)])
        self.steered = metrics.counter(
            "steered_requests_total",
            "Requests that steer, with packs or by alpha alone",
            ("by",),
            [("packs",), ("alpha",)],
        )
        self.looks = metrics.counter(
            "memory_looks_total", "Looks into the memory", ("kind",), [("token",), ("attribution",), ("packs",)]
        )
        self.iteration_tokens = metrics.histogram("iteration_tokens_total", "Tokens per step", _TOKENS)
        self.first_token = metrics.histogram("time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self.inter_token = metrics.histogram("inter_token_latency_seconds", "Between tokens of a request", _SECONDS)
        self.latency = metrics.histogram("e2e_request_latency_seconds", "Arrival to last token", _SECONDS)
        self.queue_time = metrics.histogram("request_queue_time_seconds", "Arrival to first step", _SECONDS)
        self.prefill_time = metrics.histogram("request_prefill_time_seconds", "First step to first token", _SECONDS)
        self.decode_time = metrics.histogram("request_decode_time_seconds", "First token to last", _SECONDS)
        self.process = ProcessGauges(metrics, "engine")

    def state(self, scheduler: Scheduler) -> None:
        """Refresh what is a state rather than an event."""
        self.running.set(len(scheduler.running))
        self.waiting.set(len(scheduler.waiting))
        self.kv_usage.set(1 - scheduler.pool.free / scheduler.pool.blocks)
        self.preemptions.set(scheduler.preemptions)
        self.overtakes.set(scheduler.overtakes)

    def step(self, scheduler: Scheduler, tokens: int) -> None:
        self.iteration_tokens.observe(tokens)
        self.state(scheduler)

    def started(self, sequence: Sequence, now: float) -> None:
        """A sequence is in a step for the first time. Counted now, since a client may not wait for the end."""
        sequence.started = now
        if sequence.cached is not None and sequence.request.sampling.prompt_logprobs is None:
            self.prefix_queries.add(sequence.prompt_length)
            self.prefix_hits.add(sequence.cached)
        self.queue_time.observe(now - sequence.arrived)

    def answered(self, sequences: Iterable[Sequence], now: float) -> None:
        """Sequences got their next token, or none where only a prompt was to be scored."""
        tokens = 0
        gaps: dict[float, int] = {}  # most got their last one together
        for sequence in sequences:
            tokens += sequence.request.sampling.max_tokens > 0
            if sequence.first_token is None or sequence.last_token is None:
                sequence.first_token = now
                self.prompt_tokens.add(sequence.prompt_length)
                self.first_token.observe(now - sequence.arrived)
            else:
                gap = now - sequence.last_token
                gaps[gap] = gaps.get(gap, 0) + 1
            sequence.last_token = now
        self.generation_tokens.add(tokens)
        for gap, times in gaps.items():
            self.inter_token.observe(gap, times=times)

    def finished(self, sequence: Sequence, reason: FinishReason) -> None:
        now = time.monotonic()
        started = sequence.arrived if sequence.started is None else sequence.started
        first = now if sequence.first_token is None else sequence.first_token
        self.success.add(1, reason)
        self.latency.observe(now - sequence.arrived)
        self.prefill_time.observe(first - started)
        self.decode_time.observe(now - first)
