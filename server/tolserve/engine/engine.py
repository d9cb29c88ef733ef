"""The step loop's body: schedule, page, run, sample, report."""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tolserve.engine.metrics import EngineMetrics
from tolserve.engine.packs import PackBusy, PackStore
from tolserve.engine.request import Delta, Failure, FinishReason, PackView, Request, TokenLogprob, Usage
from tolserve.engine.runner import Runner, StepResult
from tolserve.engine.sampler import choose, logprobs
from tolserve.engine.scheduler import Scheduler, prefix_within
from tolserve.engine.sequence import Chunk, Sequence
from tolserve.engine.sitout import SitOut
from tolserve.engine.steering import Steered, steer
from tolserve.metrics import Metrics
from tolserve.model.pack import PackError
from tolserve.tol.frequencies import Counts
from tolserve.tol.pager import Lease, Pager, RecordsUnavailable
from tolserve.tol.recorder import Recorder
from tolserve.tol.size import parse_cache_size
from tolserve.tol.table import Table, describe
from tolserve.tol.view import CacheSizes, TierSize
from tolserve.tol.watch import TableWatch, stamps_of

log = logging.getLogger(__name__)

Output = Delta | Failure

# Of the device slots, for records of prompts that still wait: an eighth. LRU's hit rate with the other seven falls by
# 1.7, 1.5, 1.2 points at 3.2, 5, 10% of the slots (recorded LLaMA-3 trace, 32 sequences), with three quarters by 3.6,
# 3.3, 2.6. At 4,096 slots an eighth is what several cold prompts miss, or 50 ms of reading.
WAITING_SHARE = 8


class Engine:
    """Serves requests step by step on the calling thread; assembled by engine/assemble.py."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        max_model_len: int,
        max_queue: int,
        recorder: Recorder | None = None,
        watch: TableWatch | None = None,
        packs: PackStore | None = None,
        counts: Counts | None = None,
    ) -> None:
        """`counts` is the frequency list that it was started with."""
        self.runner, self.scheduler, self.pager = runner, scheduler, runner.pager
        self.recorder, self.watch, self.packs, self._counts = recorder, watch, packs, counts
        self.max_model_len, self.max_queue = max_model_len, max_queue
        self.registry = metrics
        self.metrics = EngineMetrics(metrics)
        self._eos = runner.model.config.eos_token_id
        self._sequences: dict[str, Sequence] = {}
        self._sit_out = SitOut(self.pager, scheduler.max_fills) if self.pager is not None else None

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def add(self, request: Request) -> Failure | None:
        """Queue a request, or say why not."""
        if (problem := self._problem(request)) is not None:
            return problem
        try:
            steering = self._steered(request)
        except PackError as error:
            return Failure(request.request_id, "busy" if isinstance(error, PackBusy) else "invalid", str(error), "tol")
        sequence = Sequence(request, time.monotonic(), steering)
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)
        return None

    def _steered(self, request: Request) -> Steered | None:
        """What a request steers; last of all checks, since it takes packs. Raises PackError."""
        if (asked := request.steering) is None:
            return None
        if self.pager is None:
            raise PackError("tol: this model has no table to steer")
        steered = steer(asked, self.runner.model.config.num_hidden_layers, self.packs)
        self.metrics.steered.add(1, "packs" if asked.edits else "alpha")
        return steered

    def _problem(self, request: Request) -> Failure | None:
        vocab_size = self.runner.model.config.vocab_size
        length = len(request.prompt) + request.sampling.max_tokens
        if request.request_id in self._sequences:
            return Failure(request.request_id, "invalid", "a request with this id is already running")
        if not request.prompt:
            return Failure(request.request_id, "invalid", "the prompt has no tokens")
        if not all(0 <= token < vocab_size for token in request.prompt):
            return Failure(request.request_id, "invalid", f"a prompt token id is not below {vocab_size}")
        if length > self.max_model_len:
            return Failure(
                request.request_id, "invalid", f"prompt and max_tokens are {length} tokens; {self.max_model_len} fit"
            )
        if len(self.scheduler.waiting) >= self.max_queue:
            return Failure(request.request_id, "busy", f"{self.max_queue} requests are waiting already")
        return None

    def abort(self, request_id: str) -> None:
        """Drop a request and everything it holds; one that is gone already is no error."""
        if (sequence := self._sequences.pop(request_id, None)) is not None:
            self.scheduler.remove(sequence)
            if sequence.steering is not None and self.packs is not None:
                self.packs.give(sequence.steering.packs)
            if self.pager is not None:
                self.pager.end(request_id)
                self.pager.unneeded(sequence.tokens[sequence.computed :])
            if self.recorder is not None:
                self.recorder.ended(sequence.tokens[sequence.cached or 0 : sequence.told])

    def drain(self) -> None:
        """Have no step on its way: whoever looks, or changes something, between two steps finds nothing half done."""

    def list_packs(self) -> list[PackView]:
        """The packs that requests may ask for, by name. Raises ValueError where there is no folder of them."""
        if self.packs is None:
            raise ValueError("this server has no packs; start it with --packs DIR")
        return self.packs.view()

    def frequencies(self) -> Counts | None:
        """How often each token ran, by the list that the server keeps, else by the one that it was given."""
        kept = self.recorder.counts() if self.recorder is not None else None
        return kept if kept is not None else self._counts

    def refresh_metrics(self) -> None:
        """Bring gauges up to date between steps, finished fills included."""
        self.metrics.state(self.scheduler)
        self.metrics.process.refresh()
        if self.pager is not None:
            self.pager.poll()

    def resize(self, device_cache: str | None, host_cache: str | None) -> CacheSizes:
        """Change the tiers' sizes between two steps, in the words of the options; None leaves one as it is.

        Raises ValueError for a size that cannot be, MemoryError when there is no memory for it; nothing is changed
        then.
        """
        pager = self._paged()
        manifest = pager.table.manifest
        device, host = (
            None if size is None else parse_cache_size(size, manifest.record_bytes, manifest.vocab_size)
            for size in (device_cache, host_cache)
        )
        pager.resize(device_slots=device, host_slots=host)
        self.scheduler.max_distinct = pager.slots
        sizes = CacheSizes(
            TierSize(pager.slots, pager.device_bytes),
            TierSize(pager.host.slots, pager.host.slots * manifest.record_bytes),
        )
        log.info("the device tier has room for %d records now, the host tier for %d", pager.slots, pager.host.slots)
        return sizes

    def reopen(self) -> dict[str, Any]:
        """Go on, between two steps, with the table that lies at the table's path now; returns what table.describe says
        of it. The tiers keep their sizes in bytes.

        Raises TableError, RecordError or OSError when there is none of the same weights, MemoryError when there is no
        memory for it beside the old one; the old one stays in use then.
        """
        pager = self._paged()
        table = Table.open(pager.table.path)
        stamps, facts = stamps_of(table), describe(table)
        factors = self.runner.factors_of(table)
        pager.reopen(table)
        self.runner.factors = factors
        self.scheduler.forget_prefixes()
        self.scheduler.max_distinct = pager.slots
        if self.watch is not None:
            self.watch.follow(stamps)
        log.info("the table %s was reopened", table.path)
        return facts

    def _paged(self) -> Pager:
        if self.pager is None:
            raise ValueError("this model has no table")
        return self.pager

    def finish(self) -> None:
        """Drop what still runs and finish what is recorded: a clean end, to be followed by `close`."""
        for request_id in list(self._sequences):
            self.abort(request_id)
        if self.recorder is not None:
            self.recorder.close(finish=True)

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close(finish=False)
        if self.watch is not None:
            self.watch.close()
        if self.pager is not None:
            self.pager.close()

    def step(self) -> list[Output]:
        """Run one step of whatever the scheduler chooses."""
        chunks = self._choose_chunks()
        return self.run(chunks) if chunks else []

    def _choose_chunks(self) -> list[Chunk]:
        sitting_out = self._sit_out.choose(self.scheduler.running) if self._sit_out is not None else set()
        chunks = self.scheduler.schedule(sitting_out)
        self.metrics.sat_out.add(len(sitting_out))
        now = time.monotonic()
        for chunk in chunks:
            if chunk.sequence.started is None:
                self.metrics.started(chunk.sequence, now)
        return chunks

    def run(self, chunks: list[Chunk]) -> list[Output]:
        """Run the given chunks as one step; the outputs of a step depend on them and the state before, nothing else."""
        now = time.monotonic()
        lease = self._acquire(chunks)
        try:
            outputs, stall = self._compute(chunks, lease)
            if self._sit_out is not None:
                self._sit_out.ran(chunks, time.monotonic() - now - stall)
            return outputs
        except RecordsUnavailable as error:
            return self._fail(chunks, error)
        finally:
            if lease is not None and self.pager is not None:
                self.pager.release(lease)
            self.metrics.step(self.scheduler, sum(chunk.count for chunk in chunks))

    @torch.inference_mode()
    def _compute(self, chunks: list[Chunk], lease: Lease | None) -> tuple[list[Output], float]:
        """Run the layers, tell the policies what ran, which no row waits for, and sample: the outputs, and the seconds
        that rows were waited for."""
        try:
            result = self.runner.run(chunks, lease)
        finally:
            self._tell(chunks)
        return self._advance(chunks, result, lease), result.stall

    def _tell(self, chunks: list[Chunk]) -> None:
        """Tell policies and recorder of the tokens that run for the first time: a step may fail, or its sequence be
        preempted."""
        if self.pager is None:
            return
        new: list[int] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.start > sequence.told:  # they were in the prefix cache
                self.pager.recall(sequence.request_id, sequence.tokens[sequence.told : chunk.start])
            if chunk.end > sequence.told:
                fresh = sequence.tokens[max(chunk.start, sequence.told) : chunk.end]
                self.pager.advance(sequence.request_id, fresh)
                new += fresh
                sequence.told = chunk.end
        if self.recorder is not None:
            self.recorder.runs(new)

    def _acquire(self, chunks: list[Chunk], claim: Callable[[list[int]], Lease] | None = None) -> Lease | None:
        """Pin the step's records, by Pager.acquire or as told, then let the reads for coming steps run while this one
        computes."""
        if self.pager is None:
            return None
        tokens = [token for chunk in chunks for token in chunk.tokens]
        claim = claim if claim is not None else self.pager.acquire
        lease = claim(tokens)  # first, since its reads are what the step may wait for
        self._read_ahead(self.pager, chunks)
        return lease

    def _read_ahead(self, pager: Pager, chunks: list[Chunk]) -> None:
        """Prefetch what running sequences ask for next, then the first chunks of waiting ones, in order.

        A step waits for what is on its way to it, and its own reads share the disk with the rest. So where a sequence
        will decode in the next step, no more are on their way than the step may fill, and for waiting ones never.
        """
        scheduler = self.scheduler
        bound = scheduler.max_fills if any(chunk.samples for chunk in chunks) else pager.slots
        room = bound - pager.ahead
        ends = {id(chunk.sequence): chunk.end for chunk in chunks}
        for sequence in scheduler.running:
            start = ends.get(id(sequence), sequence.computed)
            if coming := sequence.tokens[start : start + scheduler.max_tokens]:
                room -= _prefetch(pager, coming, room)
        room = min(scheduler.max_fills - pager.ahead, pager.slots // WAITING_SHARE - pager.prefetched)
        for sequence in scheduler.waiting:
            if coming := scheduler.unread(sequence):
                room -= _prefetch(pager, coming, room)
                there = prefix_within(coming, pager.present, 0)
                sequence.read_ahead += there
                if there < len(coming):
                    return

    def _fail(self, chunks: list[Chunk], error: RecordsUnavailable) -> list[Output]:
        """Fail the sequences that needed an unreadable record; the others did not advance and run again."""
        failures: list[Output] = []
        for chunk in chunks:
            if bad := [token for token in chunk.tokens if token in error.errors]:
                failures.append(Failure(chunk.sequence.request_id, "table", str(error.errors[bad[0]])))
                self.abort(chunk.sequence.request_id)
        self.metrics.failed.add(len(failures), "table")
        return failures

    def _advance(self, chunks: list[Chunk], result: StepResult, lease: Lease | None) -> list[Output]:
        """Sample where a chunk reached its sequence's end: one call for all of them."""
        ends: list[tuple[Sequence, int]] = []  # sequences that sample, and the row of their last token
        cursor = 0
        for chunk in chunks:
            self.scheduler.ran(chunk)
            if lease is not None:
                count_lookups(chunk, result.stall, lease)
            if chunk.sequence.request.sampling.prompt_logprobs is not None:
                self._score_prompt(chunk, result.hidden, cursor)
            cursor += chunk.count
            if chunk.samples:
                ends.append((chunk.sequence, cursor - 1))
        if not ends:
            return []
        hidden = result.hidden if len(ends) == cursor else result.hidden[[row for _, row in ends]]
        sequences = [sequence for sequence, _ in ends]
        params = [sequence.request.sampling for sequence in sequences]
        if all(asked.temperature == 0 and asked.logprobs is None for asked in params):
            return self._report(sequences, self.runner.model.best(hidden).tolist(), {})
        logits = self.runner.model.logits(hidden)
        chosen = choose(logits, params, [len(sequence.tokens) for sequence in sequences])
        return self._report(sequences, chosen.tolist(), token_scores(sequences, logits, chosen))

    def _report(self, sequences: list[Sequence], tokens: list[int], scores: dict[int, TokenLogprob]) -> list[Output]:
        """Give sequences the tokens that were chosen for them; `scores` are by index."""
        self.metrics.answered(sequences, time.monotonic())
        return [
            self._extend(sequence, token, scores.get(index))
            for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        ]

    def _score_prompt(self, chunk: Chunk, hidden: Tensor, cursor: int) -> None:
        """Log-probabilities of the prompt tokens that this chunk's positions predict, if asked for. Its hidden states
        begin at row `cursor`."""
        sequence = chunk.sequence
        top = sequence.request.sampling.prompt_logprobs
        first, last = len(sequence.prompt_logprobs), min(chunk.end + 1, sequence.prompt_length)
        if top is None or first >= last:
            return
        targets = torch.tensor(sequence.tokens[first:last], device=hidden.device)
        begin = cursor - chunk.start - 1
        scored = hidden[begin + first : begin + last]
        sequence.prompt_logprobs.extend(logprobs(self.runner.model.logits(scored), targets, top))

    def _extend(self, sequence: Sequence, token: int, score: TokenLogprob | None) -> Delta:
        """Give a sequence the token that was chosen for it, and say what came of it."""
        params = sequence.request.sampling
        first_answer = not sequence.generated
        tokens = [token] if params.max_tokens else []
        sequence.tokens += tokens
        finish_reason = self._finish_reason(sequence)
        if finish_reason is not None:
            self.abort(sequence.request_id)
            self.metrics.finished(sequence, finish_reason)
        return Delta(
            sequence.request_id,
            tokens,
            _usage(sequence),
            [score] if score is not None else None,
            sequence.prompt_logprobs if first_answer and params.prompt_logprobs is not None else None,
            finish_reason,
            _new_hits(sequence) if params.token_hits else None,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params, last = sequence.request.sampling, sequence.tokens[-1]
        stops = last in params.stop_token_ids or (not params.ignore_eos and last == self._eos)
        if stops and sequence.generated:
            return "stop"
        return "length" if self._is_full(sequence, 0) else None

    def _is_full(self, sequence: Sequence, coming: int) -> bool:
        """Whether nothing may follow once so many tokens have come."""
        limit = sequence.generated + coming >= sequence.request.sampling.max_tokens
        return limit or len(sequence.tokens) + coming >= self.max_model_len


def _prefetch(pager: Pager, tokens: list[int], room: int) -> int:
    """Prefetch the first of these records, as many as are missing and have room; returns how many were started."""
    reachable = prefix_within(tokens, pager.present, room)
    return pager.prefetch(tokens[:reachable]) if reachable else 0


def count_lookups(chunk: Chunk, stall: float, lease: Lease) -> None:
    """A chunk has run: what its sequence has looked up, found and waited for."""
    sequence, tokens = chunk.sequence, chunk.tokens
    if len(tokens) == 1:
        sequence.lookups += 1
        sequence.hits += tokens[0] in lease.hits
    else:
        own = set(tokens)
        sequence.lookups += len(own)
        sequence.hits += len(own & lease.hits)
    sequence.stall += stall
    if sequence.request.sampling.token_hits:
        # A preempted sequence runs its tokens again; what counts is how each was found the first time.
        known = sequence.token_hits
        known += [None] * (chunk.start - len(known))
        known += [token in lease.hits for token in tokens[len(known) - chunk.start :]]


def token_scores(sequences: list[Sequence], logits: Tensor, chosen: Tensor) -> dict[int, TokenLogprob]:
    """Of the tokens [B] chosen from logits [B, V], by row: those of the sequences that asked for log-probabilities."""
    asked: dict[int, list[int]] = {}  # rows by the number of alternatives
    for row, sequence in enumerate(sequences):
        params = sequence.request.sampling
        if params.logprobs is not None and params.max_tokens:
            asked.setdefault(params.logprobs, []).append(row)
    return {
        row: score
        for top, rows in asked.items()
        for row, score in zip(rows, logprobs(logits[rows], chosen[rows], top), strict=True)
    }


def _new_hits(sequence: Sequence) -> list[bool | None]:
    new = sequence.token_hits[sequence.hits_reported :]
    sequence.hits_reported += len(new)
    return new


def _usage(sequence: Sequence) -> Usage:
    cached, generated = sequence.cached or 0, len(sequence.tokens) - sequence.prompt_length
    return Usage(
        sequence.prompt_length, cached, generated, sequence.lookups, sequence.hits, stall_ms=sequence.stall * 1000
    )
