"""Engines whose next tokens are forced from a trace of real text, for what measures speed.

Weights are random, so what such a model samples is unreal, and so would be what it asks of the table. The trace is an
.npz with `tokens` and `vocab_size`.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tolserve.engine.ahead import LookaheadEngine
from tolserve.engine.assemble import BLOCK_SIZE, MAX_FILLS
from tolserve.engine.blocks import BlockPool
from tolserve.engine.engine import Engine
from tolserve.engine.graphs import Decoder, Row
from tolserve.engine.kv import KVCache
from tolserve.engine.request import Request, SamplingParams
from tolserve.engine.runner import Runner
from tolserve.engine.scheduler import Scheduler
from tolserve.metrics import Metrics
from tolserve.model.serving import ServingModel
from tolserve.tol.pager import Pager
from tolserve.tol.table import Table

Trace = NDArray[np.int64]


def read_trace(path: Path, vocab_size: int) -> Trace:
    """The trace's tokens, folded onto fewer ids where the model has fewer."""
    return np.load(path, allow_pickle=False)["tokens"].astype(np.int64) % vocab_size


class Text:
    """Passages spread over a trace: their first `context` tokens are prompts, the rest is what decode steps are fed."""

    def __init__(self, trace: Trace, batch: int, context: int, part: int = 0) -> None:
        """Another `part` gives other passages, for repeats with prompts that nobody has seen."""
        starts = [(index * len(trace)) // batch + part * 4 * context for index in range(batch)]
        self.prompts = [trace[start : start + context].tolist() for start in starts]
        self._trace, self._at = trace, np.array([start + context for start in starts])

    def take(self, steps: int) -> list[list[int]]:
        """The tokens of the next steps [steps][batch]."""
        rows = self._trace[(self._at + np.arange(steps)[:, None]) % len(self._trace)]
        self._at += steps
        return rows.tolist()


class ForcedDecoder(Decoder):
    """Steps launched ahead choose on the device; here they choose what `choices` says, by request id."""

    choices: Mapping[str, int] = MappingProxyType({})

    def draw(self, rows: list[Row], logits: Tensor, tokens: Tensor) -> None:
        if self.choices:
            forced = torch.tensor([self.choices[row.sequence.request_id] for row in rows])
            tokens.copy_(forced.pin_memory() if tokens.is_cuda else forced, non_blocking=True)


class ForcedEngine:
    """The whole engine, scheduler to sampler, as benchmarks drive it; a `Peer` but for its facts."""

    def __init__(
        self,
        model: ServingModel,
        table: Table | None,
        *,
        slots: int = 0,
        host_slots: int = 0,
        sequences: int,
        longest: int,
        dtype: torch.dtype,
        policy: str = "context",
        chunk: int = 512,
        ahead: bool | None = None,
    ) -> None:
        """Tiers of `slots` and `host_slots` records for a model with a table; room for `sequences` of `longest` tokens
        each. `ahead` as in engine/assemble.py, whose parts these are."""
        config, metrics, device = model.config, Metrics(), model.device.type
        ahead = device == "cuda" if ahead is None else ahead
        pager = None
        if table is not None:
            options: dict[str, Any] = {"device": device, "policy": policy, "mapped": ahead, "metrics": metrics}
            pager = Pager(table, device_slots=slots, host_slots=host_slots, **options)
        self.kv_bytes_per_token = KVCache.bytes_per_block(config, BLOCK_SIZE, dtype) // BLOCK_SIZE
        each = -(-longest // BLOCK_SIZE) + 1
        blocks = sequences * each
        room = {"blocks": blocks + ahead, "block_size": BLOCK_SIZE, "max_len": each * BLOCK_SIZE}
        kv = KVCache(config, **room, dtype=dtype, device=device)
        scheduler = Scheduler(
            BlockPool(blocks, BLOCK_SIZE),
            max_seqs=sequences,
            max_tokens=chunk,
            max_distinct=pager.slots if pager is not None else None,
            present=pager.present if pager is not None else None,
            max_fills=MAX_FILLS[device],
            prefix_cache=False,  # prompts come again, to be computed again
        )
        runner = Runner(model, kv, pager)
        parts = (runner, scheduler, metrics)
        limits: dict[str, Any] = {"max_model_len": 1_000_000, "max_queue": sequences}
        self._decoder = ForcedDecoder(runner, max_rows=sequences, spare=blocks) if ahead else None
        if self._decoder is not None:
            self.engine: Engine = LookaheadEngine(*parts, decoder=self._decoder, **limits)
        else:
            self.engine = Engine(*parts, **limits)
        self._running: list[str] = []
        self._forced: list[int] = []  # of each sequence, how many tokens it had when one was replaced last

    def start(self, prompts: list[list[int]]) -> None:
        """Drop what runs, then run these prompts until each has its first token."""
        self.stop()
        while self.engine.busy:  # a step that was launched ahead
            self.engine.step()
        for index, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)
            request = Request(str(index), tuple(prompt), params)
            self._running.append(request.request_id)
            self._forced.append(0)
            if (failure := self.engine.add(request)) is not None:
                raise RuntimeError(failure.message)
        while any(sequence.generated == 0 for sequence in self.engine.scheduler.sequences()):
            self.engine.step()

    def step(self, tokens: list[int]) -> None:
        """One engine step, with each sequence's own of `tokens` in place of what it sampled last; one that sat a step
        out keeps the token whose record it waits for. Of a step launched ahead they are what it chooses, so that the
        next one runs them."""
        if self._decoder is not None:
            self._decoder.choices = dict(zip(self._running, tokens, strict=True))
        else:
            self._replace(tokens)
        self.engine.step()

    def _replace(self, tokens: list[int]) -> None:
        for sequence in self.engine.scheduler.running:
            index = int(sequence.request_id)
            if sequence.generated > self._forced[index]:
                sequence.tokens[-1] = tokens[index]
                self._forced[index] = sequence.generated

    def stop(self) -> None:
        for request_id in self._running:
            self.engine.abort(request_id)
        if self._decoder is not None:
            self._decoder.choices = {}
        self._running.clear()
        self._forced.clear()

    def timed_steps(self, tokens: list[list[int]]) -> list[float]:
        """Seconds of each of these steps."""
        times = []
        for row in tokens:
            started = time.perf_counter()
            self.step(row)
            times.append(time.perf_counter() - started)
        return times

    @property
    def generated(self) -> int:
        """Tokens of all sequences that run."""
        return sum(sequence.generated for sequence in self.engine.scheduler.sequences())

    def counters(self) -> dict[str, float]:
        """The table's counters by name, labels summed."""
        return {
            m.name.removeprefix("tolserve_"): sum(s.value for s in m.samples) for m in self.engine.registry.snapshot()
        }

    def warm(self, trace: Trace, lookups: int) -> None:
        """Bring a bounded cache to its steady state: frequent records first, then the trace itself, as a decode would.
        A cache of the whole table is filled."""
        pager = self.engine.pager
        if pager is None:
            return
        if pager.slots >= pager.table.manifest.vocab_size:
            pager.preload()
            return
        ids, counts = np.unique(trace, return_counts=True)
        pager.preload(ids[np.argsort(-counts, kind="stable")][: pager.slots].tolist())
        for token in trace[:lookups].tolist():
            lease = pager.acquire([token])
            lease.wait()
            pager.release(lease)

    def bytes(self) -> dict[str, int]:
        """What is held next to the computation; keys and values by token."""
        pager, runner = self.engine.pager, self.engine.runner
        return {
            "weights": runner.model.nbytes,
            "kv_per_token": self.kv_bytes_per_token,
            "device_cache": pager.device_bytes if pager is not None else 0,
            "factors": sum(factor.nbytes for factor in runner.factors.values()),
        }

    def close(self) -> None:
        self.stop()
        self.engine.close()
