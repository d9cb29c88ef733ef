"""An engine that launches a decode step before it knows the tokens of the one that runs: the device never waits.

While step n runs, step n+1 is launched with n's tokens taken from device memory. Its rows are found by the device: in
the arena, or in host memory, where they are read in place. When n's tokens reach the host they are looked up, pinned
and counted after the fact: between launch and `settle` nothing changes in the tiers, so the host's maps say what the
step saw. A sequence whose record was nowhere is void in that step: what it computed is thrown away, and it runs again
once its record has come. The others do not wait for it.

All steps run on one stream, in order. So what a void or finished sequence writes into its KV blocks is overwritten, or
never read, by whoever has the blocks after it: they may be freed while the step still runs.
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tolserve.engine.engine import Engine, Output, count_lookups, token_scores
from tolserve.engine.graphs import Decoder, Launch, Row
from tolserve.engine.request import Failure, Request
from tolserve.engine.sequence import Chunk, Sequence
from tolserve.tol.lease import Lease
from tolserve.tol.pager import RecordsUnavailable
from tolserve.tol.view import CacheSizes

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Flight:
    """A decode step on its way. Its rows' tokens and leases are known once it is settled."""

    rows: list[Row]
    launch: Launch
    launched: float
    absent: list[Sequence] = field(default_factory=list)  # not in it: their records are to be asked for
    lease: Lease | None = None  # of what was looked up for it
    stall: float = 0.0

    def leases(self) -> set[Lease]:
        """Its own, and those of rows that were looked up for an earlier step."""
        return {lease for lease in (self.lease, *(row.lease for row in self.rows)) if lease is not None}


class LookaheadEngine(Engine):
    """`Engine`, one decode step ahead of the host's knowledge. Steps with prompts, or with somebody who steers, run as
    they do there, alone."""

    def __init__(self, *args: Any, decoder: Decoder, **options: Any) -> None:
        super().__init__(*args, **options)
        self.decoder = decoder
        self._flight: Flight | None = None
        self._late: dict[str, Lease] = {}  # of sequences that wait for their record, by request id
        self._kept: list[Output] = []  # of a step that was cut short by a change
        self._full = False  # nobody who waits finds room beside those that decode, until one of them ends
        self._landed = 0.0  # when a step was last read

    @property
    def busy(self) -> bool:
        return super().busy or self._flight is not None or bool(self._kept)

    def add(self, request: Request) -> Failure | None:
        self._full = False
        return super().add(request)

    def abort(self, request_id: str) -> None:
        self._full = False
        self._kept = [output for output in self._kept if output.request_id != request_id]
        super().abort(request_id)
        if (lease := self._late.pop(request_id, None)) is not None:
            self._let_go([lease])

    def step(self) -> list[Output]:
        """Launch a step, and give the outputs of the one before it."""
        outputs, self._kept = self._kept, []
        flight = self._flight
        if flight is None:
            return outputs + self._begin()
        following = self._follow(flight)
        outputs += self._land(flight)
        self._flight = following
        if following is not None:
            self._settle(following)
        self._let_go(flight.leases())
        return outputs

    def _begin(self) -> list[Output]:
        """A step whose tokens are known, with nothing on its way."""
        chunks = self._choose_chunks()
        if not all(chunk.count == 1 and chunk.samples and chunk.sequence.steering is None for chunk in chunks):
            return self.run(chunks)
        self._full = True
        return self._start(chunks) if chunks else []

    def _acquire(self, chunks: list[Chunk], claim: Callable[[list[int]], Lease] | None = None) -> Lease | None:
        """A step whose tokens are known takes over what was looked up for sequences that waited, and gives up what was
        for those that are not in it: their slots may be needed."""
        if claim is None and self.pager is not None and self._late:
            late, self._late = self._late, {}
            ends = {chunk.sequence.request_id: chunk.sequence.tokens[-1] for chunk in chunks if chunk.samples}
            past: dict[int, Lease] = {}
            for name in late:  # the earliest first: it was the one that missed
                if name in ends:
                    past.setdefault(ends[name], late[name])
            self._let_go(set(late.values()) - set(past.values()))
            claim = partial(self.pager.acquire, past=past)
        return super()._acquire(chunks, claim)

    def _start(self, chunks: list[Chunk]) -> list[Output]:
        """Launch a step of decodes whose tokens are known, when their records are there."""
        lease = self._acquire(chunks)
        stall = 0.0
        try:
            if lease is not None and self.pager is not None:
                stall = lease.wait()
                self.pager.publish(wait=True)
        except RecordsUnavailable as error:
            failures = self._fail(chunks, error)
            self._let_go([lease] if lease is not None else [])
            return failures
        rows = [Row(chunk.sequence, chunk.start, chunk.tokens[0], lease=lease) for chunk in chunks]
        self._flight = Flight(rows, self.decoder.launch(rows), time.monotonic(), lease=lease, stall=stall)
        self._tell(chunks)
        return []

    def _follow(self, flight: Flight) -> Flight | None:
        """Launch the step after `flight`; None where the host must see its outputs first."""
        scheduler, pager = self.scheduler, self.pager
        seats = len(scheduler.running) < scheduler.max_seqs
        if scheduler.waiting and seats and not self._full:
            return None
        if _scored(row.sequence for row in flight.rows):
            return None  # they are computed of logits that the next step overwrites
        if pager is not None:
            pager.publish()
        found = self._next_rows(flight)
        if found is None or not found[0] or len(found[0]) > min(self.decoder.max_rows, scheduler.max_tokens):
            return None
        rows, absent = found
        if pager is not None:
            if pager.pinned + len(rows) + len(absent) > pager.slots:
                return None
            pager.launch_blind()
        for row in rows:
            self._late.pop(row.sequence.request_id, None)
        self.metrics.sat_out.add(len(absent) + len(self._late))
        return Flight(rows, self.decoder.launch(rows), time.monotonic(), absent)

    def _next_rows(self, flight: Flight) -> tuple[list[Row], list[Sequence]] | None:
        """Who runs after `flight`, and whose records must be asked for first; None where a step must be put together
        anew: for a prompt, for somebody who steers, for want of KV blocks, for a record that cannot be read."""
        index_of = {id(row.sequence): index for index, row in enumerate(flight.rows) if not row.void}
        rows: list[Row] = []
        absent: list[Sequence] = []
        for sequence in self.scheduler.running:
            if (index := index_of.get(id(sequence))) is not None:
                if self._is_full(sequence, 1):
                    continue
                row = Row(sequence, sequence.computed + 1, source=index)
            elif sequence.pending > 1 or sequence.steering is not None:
                return None
            else:
                token, lease = sequence.tokens[-1], self._late.get(sequence.request_id)
                if lease is not None and token in lease.lost:
                    return None
                if self.pager is not None and not self.pager.reach(token):
                    absent += [sequence] if lease is None else []
                    continue
                row = Row(sequence, sequence.computed, token, lease=lease)
            if not self.scheduler.pool.grow(sequence.blocks, row.position + 1):
                return None
            rows.append(row)
        return rows, absent

    def _settle(self, flight: Flight) -> None:
        """The tokens of a step that runs are known now: claim their records, and see which it found."""
        if self.pager is None:
            return
        fresh = [row for row in flight.rows if row.lease is None and self._alive(row.sequence)]
        absent = [sequence for sequence in flight.absent if self._alive(sequence)]
        for row in fresh:
            row.void = not self.pager.reach(row.sequence.tokens[row.position])
        chunks = [Chunk(row.sequence, row.position, 1) for row in fresh]
        chunks += [Chunk(sequence, sequence.computed, 1) for sequence in absent]
        returned = [row.token for row in flight.rows if row.lease is not None]
        lease = self._acquire(chunks, partial(self.pager.settle, held=returned))
        flight.lease = lease
        for row in fresh:
            row.lease = lease
        void = [row.sequence for row in fresh if row.void]
        if lease is not None:
            self._late |= {sequence.request_id: lease for sequence in absent + void}
            flight.stall += lease.unreported
        self.metrics.sat_out.add(len(void))
        self._tell(chunks)

    def _land(self, flight: Flight) -> list[Output]:
        """Wait for a step and take its tokens over."""
        tokens, missed = flight.launch.read()
        now = time.monotonic()
        done = [index for index, row in enumerate(flight.rows) if not row.void and self._alive(row.sequence)]
        if wrong := [index for index in done if missed[index]]:
            raise RuntimeError(f"rows {wrong} of a step found no record where the host's maps have one")
        chunks = [Chunk(flight.rows[index].sequence, flight.rows[index].position, 1) for index in done]
        for index, chunk in zip(done, chunks, strict=True):
            self.scheduler.ran(chunk)
            if (lease := flight.rows[index].lease) is not None:
                count_lookups(chunk, flight.stall, lease)
        if self._sit_out is not None:
            self._sit_out.ran(chunks, now - max(flight.launched, self._landed))
        self._landed = now
        sequences = [chunk.sequence for chunk in chunks]
        scores = token_scores(sequences, *flight.launch.choices(done)) if _scored(sequences) else {}
        outputs = self._report(sequences, [tokens[index] for index in done], scores)
        self.metrics.step(self.scheduler, len(done))
        return outputs

    def _alive(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request_id) is sequence

    def _let_go(self, leases: Iterable[Lease]) -> None:
        """Release leases of steps that are over, but for those that somebody still counts on."""
        used = set(self._late.values()) | (self._flight.leases() if self._flight is not None else set())
        if self.pager is not None:
            for lease in set(leases) - used:
                self.pager.release(lease, over=True)

    def drain(self) -> None:
        """Have nothing on its way."""
        if (flight := self._flight) is not None:
            outputs = self._land(flight)
            self._kept += outputs
            self._flight = None
            self._let_go(flight.leases())
        leases = list(self._late.values())
        self._late.clear()
        self._let_go(leases)

    def resize(self, device_cache: str | None, host_cache: str | None) -> CacheSizes:
        self.drain()
        sizes = super().resize(device_cache, host_cache)
        self._capture_anew()
        return sizes

    def reopen(self) -> dict[str, Any]:
        self.drain()
        facts = super().reopen()
        self._capture_anew()
        return facts

    def _capture_anew(self) -> None:
        """The tiers are others by now, and what was before may be gone. There is room, since the old graphs and the
        old tier lay beside the new one until now; if another process has taken it, steps go on without graphs."""
        try:
            self.decoder.capture()
        except MemoryError as error:
            log.warning("decode steps are slower from now on, until the tiers are changed again: %s", error)

    def close(self) -> None:
        if self.pager is not None:
            self.pager.quiet()  # what was launched still reads memory that goes now
        super().close()


def _scored(sequences: Iterable[Sequence]) -> bool:
    return any(sequence.request.sampling.logprobs is not None for sequence in sequences)
