"""What paging costs a GPU: the real core on the real disk against the layer clock of a GPU that is not there.

    python benchmarks/paging.py --trace trace-llama3.npz --tables /fast/disk/tables --out results/paging-cpu.json

**The clock.** A step of 24 layers takes 1 ms for 1 sequence and 2 ms for 32. It begins when its tokens are known,
before the pager hears of them. Layer l wants its rows at (l + ATTENTION_SHARE) / 24 of the step; if they come later,
every layer behind waits as well. The stall is how much later the step ends than it would have. What of it the pager
spent waiting for fills is `rows`; the rest, work that was late, is `host`. `release` runs while the layers do, and the
engine thread then waits without the GIL until the step is over. It spins, as CUDA's own waiting does by default where
there are cores enough; a core that sleeps 2 ms between steps runs the next one's first microseconds at half its speed.

**The records** are random, the tokens those of a trace: its odd documents, as `tolserve table replay` interleaves them.
The device cache has a quarter of the bytes that the FFNs have in bf16. Reads bypass the page cache where `io` is
"direct". A full host tier holds the whole table.

**The variants** take turns, round by round:

- resident: every lookup hits; what the clock itself and a step's bookkeeping cost
- whole: whole records
- split: the first layer group has slots of its own, `--head-factor` times as many as the rest
- sit out: a sequence whose record is on disk lets one step pass, in which the record is read

Tokens per second count a step's stall and, for "sit out", the sequences that ran. `disk_floor` is the stall that the
same batches of reads would have caused with nothing but the disk in between, by its median latency; `disk_too_slow` are
stalled steps whose wait was longer than the disk's own 99th percentile for that many reads.
"""

import argparse
import statistics
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import report

from tolserve.metrics import Metrics
from tolserve.study.random_table import random_table
from tolserve.tol.disk import DiskSource, ReadRequest
from tolserve.tol.encoding import Encoding
from tolserve.tol.frequencies import most_frequent
from tolserve.tol.pager import Lease, Pager
from tolserve.tol.policy import POLICIES
from tolserve.tol.replay import Trace
from tolserve.tol.table import Table

LAYERS, HIDDEN_SIZE = 24, 2048  # the paper's 1B shape
# A quarter of its FFNs' bytes in bf16, whole records: 4,096 of them in bf16.
DEVICE_BYTES = 402_653_184
STEP_MS = {1: 1.0, 32: 2.0}
# Of a layer's time: its attention comes first, and what follows it in a layer of this model is little.
ATTENTION_SHARE = 0.5
BATCHES = (1, 2, 4, 8, 16, 32)
BATCH_TRIES = 200


class Running:
    """Documents that run side by side, a token a step; the next waiting one takes the place of one that ends."""

    def __init__(self, trace: Trace, sequences: int) -> None:
        self._trace = trace
        self._documents = np.flatnonzero(np.diff(trace.offsets)).tolist()
        self._at = self._started = 0
        self._lanes = [self._next() for _ in range(sequences)]

    def _next(self) -> list[int]:
        """Its own number, the place of its next token, its end."""
        document = self._documents[self._at % len(self._documents)]
        self._at += 1
        self._started += 1
        return [self._started, int(self._trace.offsets[document]), int(self._trace.offsets[document + 1])]

    def jump(self, place: float) -> list[int]:
        """Go on at this share of the documents; returns the sequences that are over."""
        over = [number for number, _, _ in self._lanes]
        self._at = int(place * len(self._documents))
        self._lanes = [self._next() for _ in over]
        return over

    def tokens(self) -> list[tuple[int, int]]:
        """Sequence and token of each lane."""
        return [(number, int(self._trace.tokens[at])) for number, at, _ in self._lanes]

    def advance(self, lanes: Sequence[int]) -> list[int]:
        """These lanes ran their token; returns the sequences that are over."""
        over = []
        for lane in lanes:
            self._lanes[lane][1] += 1
            number, at, end = self._lanes[lane]
            if at == end:
                over.append(number)
                self._lanes[lane] = self._next()
        return over


@dataclass(frozen=True)
class Disk:
    """Seconds from submitting a batch of whole random records to having the last one, by BATCHES."""

    p50: list[float]
    p99: list[float]

    @staticmethod
    def at(curve: list[float], reads: int) -> float:
        return curve[min(bisect_left(BATCHES, reads), len(BATCHES) - 1)]


def measure_disk(table: Table, io: str) -> Disk:
    source = DiskSource(table, io)
    draw = np.random.default_rng(2)
    groups = range(len(table.manifest.groups))
    target = np.empty(table.manifest.record_bytes, np.uint8)
    p50, p99 = [], []
    for batch in BATCHES:
        times = []
        for _ in range(BATCH_TRIES):
            tokens = draw.integers(0, table.manifest.vocab_size, batch).tolist()
            requests = [ReadRequest(token, groups, lambda payload: np.copyto(target, payload)) for token in tokens]
            started = time.perf_counter()
            source.submit(requests)
            left = batch
            while left:
                left -= len(source.finished(block=True))
            times.append(time.perf_counter() - started)
        p50.append(float(np.percentile(times, 50)))
        p99.append(float(np.percentile(times, 99)))
    source.close()
    return Disk(p50, p99)


@dataclass
class Tally:
    """Of every measured step, in seconds."""

    rows: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)  # tokens per second over resident's, by round


class Variant:
    """A pager, the documents that it serves, and how a step goes."""

    def __init__(self, name: str, pager: Pager, metrics: Metrics, disk: Disk) -> None:
        self.name, self.pager, self.disk = name, pager, disk
        self._metrics = metrics
        self.resident = pager.slots - pager.slots // 64 if name == "resident" else None  # some slots are kept free
        manifest = pager.table.manifest
        layers = [manifest.groups[part.groups.start].layers[0] for part in pager.parts]
        self._wanted = [(layer + ATTENTION_SHARE) / LAYERS for layer in layers]

    def start(self, trace: Trace, sequences: int, warm_lookups: int) -> None:
        self.running = Running(trace, sequences)
        self.nominal = STEP_MS[sequences] / 1000
        self.tally = Tally()
        for _ in range(0 if self.resident else -(-warm_lookups // sequences)):
            self.step(clocked=False)
        self.spent: Counter[str] = Counter()

    def round(self, steps: int, place: float, unmeasured_lookups: int) -> None:
        """Steps by the clock, after some that settle the cache in another part of the documents: they differ much."""
        sequences = len(self.running.tokens())
        for sequence in self.running.jump(place):
            self.pager.end(sequence)
        for _ in range(unmeasured_lookups // sequences):
            self.step(clocked=False)
        before = self._counters()
        for _ in range(steps):
            self.step()
        after = self._counters()
        self.spent.update({key: value - before.get(key, 0.0) for key, value in after.items()})

    def preload(self, frequent: list[int]) -> None:
        self.pager.preload(range(self.resident) if self.resident else frequent[: self.pager.slots])

    def _counters(self) -> dict[str, float]:
        self.pager.poll()
        return {
            f"{m.name.removeprefix('tolserve_tol_')} {' '.join(s.labels)}".strip(): s.value
            for m in self._metrics.snapshot()
            for s in m.samples
        }

    def _choose(self, tokens: list[tuple[int, int]]) -> list[int]:
        """The lanes that run now."""
        every = range(len(tokens))
        if self.name != "sit out":
            return list(every)
        pager = self.pager
        return [lane for lane in every if pager.present(tokens[lane][1]) or tokens[lane][1] in pager.host] or list(
            every
        )

    def step(self, clocked: bool = True) -> None:
        pager = self.pager
        tokens = self.running.tokens()
        if self.resident is not None:
            tokens = [(sequence, token % self.resident) for sequence, token in tokens]
        begin = time.perf_counter()
        lanes = self._choose(tokens)
        lease = pager.acquire(list(dict.fromkeys(tokens[lane][1] for lane in lanes)))
        rows, host, waited = self._wait(lease, begin)
        for lane in lanes:
            pager.advance(tokens[lane][0], (tokens[lane][1],))
        if len(lanes) < len(tokens):
            pager.prefetch([token for _, token in tokens])
        floor, reads = self._floor(lease)
        pager.release(lease)
        for sequence in self.running.advance(lanes):
            pager.end(sequence)
        if not clocked:
            return
        left = begin + self.nominal + rows + host - time.perf_counter()
        host += max(0.0, -left)
        for kept, value in zip(
            ("rows", "host", "floor", "waited", "reads", "ran"),
            (rows, host, floor, waited, reads, len(lanes)),
            strict=True,
        ):
            getattr(self.tally, kept).append(value)
        end = time.perf_counter() + left
        while time.perf_counter() < end:
            time.sleep(0)  # lets go of the GIL and keeps the core awake

    def _wait(self, lease: Lease, begin: float) -> tuple[float, float, float]:
        """Seconds by which rows and host work delayed the layers; seconds that the pager waited."""
        rows = host = total = 0.0
        for part, wanted in enumerate(self._wanted):
            waited = lease.wait(part)
            late = max(0.0, time.perf_counter() - begin - wanted * self.nominal - rows - host)
            rows += min(late, waited)
            host += late - min(late, waited)
            total += waited
        return rows, host, total

    def _floor(self, lease: Lease) -> tuple[float, int]:
        """The stall that the step's reads would cause if there were nothing but the disk; and how many they are."""
        reads = [min(fill.slots) for fill in lease.fills if fill.source == "disk"]
        floor = 0.0
        for part, wanted in enumerate(self._wanted):
            if needed := sum(first <= part for first in reads):
                floor = max(floor, Disk.at(self.disk.p50, needed) - wanted * self.nominal)
        return floor, len(reads)

    def tokens_per_second(self, first: int) -> float:
        """Of the steps from `first` on."""
        tally = self.tally
        ran = tally.ran[first:]
        return sum(ran) / (len(ran) * self.nominal + sum(tally.rows[first:]) + sum(tally.host[first:]))

    def figures(self) -> dict[str, Any]:
        tally = self.tally
        spent = self.spent
        rows, host, reads = np.array(tally.rows), np.array(tally.host), np.array(tally.reads)
        stall = rows + host
        steps = len(stall)
        slow = (rows > 0) & (np.array(tally.waited) > [Disk.at(self.disk.p99, max(1, n)) for n in reads]) & (reads > 0)
        misses = {key.split()[1]: value for key, value in spent.items() if key.startswith("misses_total")}
        read_bytes = sum(value for key, value in spent.items() if key.startswith("read_bytes_total"))
        share = steps * self.nominal

        def percent(value: float) -> float:
            return round(100 * float(value), 2)

        return {
            "relative_tokens_per_second": round(statistics.median(tally.relative), 4),
            "relative_by_round": [round(value, 4) for value in tally.relative],
            "stall_percent": percent(stall.sum() / share),
            "rows_percent": percent(rows.sum() / share),
            "host_percent": percent(host.sum() / share),
            "disk_floor_percent": percent(sum(tally.floor) / share),
            "stalled_steps_percent": percent((stall > 0).mean()),
            "disk_too_slow_steps_percent": percent(slow.mean()),
            "disk_too_slow_stall_percent": percent(rows[slow].sum() / share),
            "stall_us_p50_p99": [round(1e6 * float(np.percentile(stall, p))) for p in (50, 99)],
            "hit_rate": round(spent["hits_total"] / spent["lookups_total"], 4),
            "misses_per_step": {source: round(value / steps, 3) for source, value in misses.items()},
            "bytes_up_per_step": round(read_bytes / steps),
            "sequences_per_step": round(sum(tally.ran) / steps, 2),
            "steps": steps,
        }


def make_variants(table: Table, disk: Disk, host: bool, args: argparse.Namespace) -> list[Variant]:
    slots = DEVICE_BYTES // table.manifest.record_bytes
    variants = []
    for name in args.variants:
        metrics = Metrics()
        pager = Pager(
            table,
            device_slots=slots,
            host_slots=table.manifest.vocab_size if host else 0,
            device="cpu",
            policy=args.policy,
            head_factor=args.head_factor if name == "split" else None,
            io=args.io,
            metrics=metrics,
        )
        variants.append(Variant(name, pager, metrics, disk))
    return variants


def measure(variants: list[Variant], sequences: int, args: argparse.Namespace) -> dict[str, Any]:
    """All variants on the same documents, in turns."""
    for variant in variants:
        variant.start(args.documents, sequences, args.warm_lookups)
    steps = round(args.round_seconds * 1000 / STEP_MS[sequences])
    for number in range(args.rounds):
        for variant in variants:
            variant.round(steps, (number + 1) / (args.rounds + 1), args.warm_lookups // 4)
        speeds = [variant.tokens_per_second(number * steps) for variant in variants]
        for variant, speed in zip(variants, speeds, strict=True):
            variant.tally.relative.append(speed / speeds[0])
    return {variant.name: variant.figures() for variant in variants}


def measure_table(name: str, args: argparse.Namespace) -> dict[str, Any]:
    options = {} if name == "bf16" else {"encoding": Encoding(name, args.group_size)}
    shape = {"vocab_size": args.vocab, "num_layers": LAYERS, "hidden_size": HIDDEN_SIZE}
    table = random_table(args.tables / f"{name}-{args.vocab}", **shape, **options)
    disk = measure_disk(table, args.io)
    result: dict[str, Any] = {
        "record_bytes": table.manifest.record_bytes,
        "layer_groups": [len(group.layers) for group in table.manifest.groups],
        "disk_batches": list(BATCHES),
        "disk_us_p50": [round(1e6 * seconds) for seconds in disk.p50],
        "disk_us_p99": [round(1e6 * seconds) for seconds in disk.p99],
    }
    for host in args.host:
        variants = make_variants(table, disk, host == "full", args)
        for variant in variants:
            variant.preload(args.frequent)
        result["io"] = variants[0].pager.disk.io
        result["parts"] = {v.name: [(part.slots, part.bytes) for part in v.pager.parts] for v in variants}
        where = result["host tier: the whole table" if host == "full" else "no host tier"] = {}
        for sequences in args.sequences:
            where[f"{sequences} sequences"] = figures = measure(variants, sequences, args)
            for variant, row in figures.items():
                print(name, f"host={host}", f"sequences={sequences}", variant, row, flush=True)
        for variant in variants:
            variant.pager.check()
            variant.pager.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--tables", type=Path, required=True, help="folder of the random tables, written if absent")
    parser.add_argument("--encodings", nargs="+", default=["bf16", "int8", "int4"], choices=("bf16", "int8", "int4"))
    parser.add_argument("--group-size", type=int, default=64, help="values per scale of int8 and int4")
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 1], choices=STEP_MS)
    parser.add_argument("--host", nargs="+", default=["none", "full"], choices=("none", "full"))
    parser.add_argument("--variants", nargs="+", default=["resident", "whole", "split", "sit out"])
    parser.add_argument("--head-factor", type=float, default=4.0)
    parser.add_argument("--policy", default="context", choices=POLICIES)
    parser.add_argument("--io", default="direct", choices=("direct", "buffered"))
    parser.add_argument("--vocab", type=int, help="fold token ids onto fewer (a smaller table)")
    parser.add_argument(
        "--warm-lookups", type=int, default=32_000, help="before the first round; an eighth of it before each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=0.6)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.variants[0] != "resident":
        parser.error("the first variant must be resident: the others are compared with it")
    trace = Trace.load(args.trace)
    args.vocab = args.vocab or trace.vocab_size
    trace = Trace(trace.tokens % args.vocab, trace.offsets, args.vocab)
    args.documents = trace.documents(range(1, len(trace.offsets) - 1, 2))
    args.frequent = most_frequent(np.bincount(trace.documents(range(0, len(trace.offsets) - 1, 2)).tokens))
    args.tables.mkdir(parents=True, exist_ok=True)
    result = {
        "policy": args.policy,
        "head_factor": args.head_factor,
        "attention_share": ATTENTION_SHARE,
        "step_ms": {str(sequences): STEP_MS[sequences] for sequences in args.sequences},
        "tables": {name: measure_table(name, args) for name in args.encodings},
        "machine": report.machine(),
    }
    report.write(result, args.out)


if __name__ == "__main__":
    main()
