"""What a choice of cache sizes costs and brings, before anything is started: bytes, hit rates, reads, stall."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Protocol

import numpy as np

from tolserve.tol.arena import ALIGNMENT
from tolserve.tol.disk import DiskSource, Read, ReadRequest
from tolserve.tol.encoding import GROUP_SIZE, Encoding, EncodingError, values_of
from tolserve.tol.estimate import Demand
from tolserve.tol.manifest import Manifest
from tolserve.tol.part import spare_slots
from tolserve.tol.size import parse_cache_size
from tolserve.tol.table import Bytes, Table
from tolserve.tol.writer import lay_out

# Together about a second. At 0.1 ms a read each is some thousands of reads, of which the 99th percentile is steady.
_MEASURE_SECONDS = 0.5
_OUTSTANDING = 8  # about a step's misses at the cache sizes that save memory
# A GPU's step of the 1B shape: 1 ms alone, 2 ms with 32 sequences, taken as a straight line between.
_STEP_MS, _STEP_MS_PER_SEQUENCE = 1.0, 1 / 31
_SHARES = (0.01, 0.05, 0.1, 0.2)

PROCESS_NOTE = "The two processes themselves take about 0.5 GB of RAM more."
BASE_NOTE = f"A base model has no table and no tiers. {PROCESS_NOTE}"


class PlanError(ValueError):
    """A size that cannot be planned for; the message says why."""


@dataclass(frozen=True)
class TableShape:
    """Sizes of a table's records, in bytes; `read_bytes` is what a read moves, whole pages, on average."""

    path: str | None  # None if it is still to be built
    encoding: str
    vocab_size: int
    record_bytes: int
    record_stride: int
    read_bytes: float
    slot_bytes: int  # of the device tier

    @classmethod
    def of(cls, table: Table) -> "TableShape":
        return cls._of(table.manifest, str(table.path))

    @classmethod
    def to_be_built(cls, name: str, *, vocab_size: int, num_hidden_layers: int, hidden_size: int) -> "TableShape":
        """As a start would build it. Raises TableError for an encoding that does not fit, EncodingError for a lowrank
        one, whose ranks only a build knows."""
        values, lowrank = values_of(name)
        if lowrank:
            raise EncodingError(f"encoding {name} has ranks that only a build knows; run `tolserve table build` first")
        encoding = Encoding(values, None if values == "bf16" else GROUP_SIZE)
        manifest = lay_out(
            vocab_size=vocab_size,
            num_layers=num_hidden_layers,
            hidden_size=hidden_size,
            fingerprint="none yet",
            encoding=encoding,
        )
        return cls._of(manifest, None)

    @classmethod
    def _of(cls, manifest: Manifest, path: str | None) -> "TableShape":
        return cls(
            path,
            manifest.encoding.name,
            manifest.vocab_size,
            manifest.record_bytes,
            manifest.record_stride,
            manifest.read_bytes(range(len(manifest.groups))),
            -(-manifest.record_bytes // ALIGNMENT) * ALIGNMENT,
        )

    def slots(self, size: str) -> int:
        """Records of a cache size, as the server counts them. Raises PlanError for one that cannot be."""
        try:
            return parse_cache_size(size, self.record_bytes, self.vocab_size)
        except ValueError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True)
class DiskSpeed:
    """Reads of random records through the server's own disk tier, checksums included."""

    io: str
    page_cache: str
    reads: int
    p50_ms: float  # of a read alone
    p99_ms: float
    bytes_per_second: float  # with `outstanding` reads at once, of what the reads move
    outstanding: int

    def seconds(self, reads: int, read_bytes: float) -> float:
        """Until a step's reads are all in: the latency of one, and the others at the disk's throughput."""
        return self.p50_ms / 1000 + (reads - 1) * read_bytes / self.bytes_per_second if reads else 0.0


def measure_disk(table: Table) -> DiskSpeed:
    """Read random records for about a second. Raises RecordError if one cannot be read, OSError for a file."""
    landing = np.empty(table.manifest.record_bytes, np.uint8)
    groups, vocab_size = range(len(table.manifest.groups)), table.manifest.vocab_size
    random = np.random.default_rng(0)

    def deliver(payload: Bytes) -> None:
        landing[: payload.size] = payload

    def requests(count: int) -> list[ReadRequest]:
        return [ReadRequest(int(token), groups, deliver) for token in random.integers(0, vocab_size, count)]

    source = DiskSource(table)
    try:
        cached = source.cached_share()
        alone: list[float] = []
        until = time.perf_counter() + _MEASURE_SECONDS
        while (started := time.perf_counter()) < until:
            source.submit(requests(1))
            _check(source.finished(block=True))
            alone.append((time.perf_counter() - started) * 1000)
        moved, reads, started = 0, 0, time.perf_counter()
        source.submit(requests(_OUTSTANDING))
        while (now := time.perf_counter()) < started + _MEASURE_SECONDS:
            over = _check(source.finished(block=True))
            moved, reads = moved + sum(read.bytes for read in over), reads + len(over)
            source.submit(requests(len(over)))
        p50, p99 = np.percentile(alone, [50, 99]).tolist()
        known = "in unknown state" if cached is None else f"with {cached:.0%} of the table"
        cache = "bypassed" if source.io == "direct" else known
        return DiskSpeed(source.io, cache, len(alone) + reads, p50, p99, moved / (now - started), _OUTSTANDING)
    finally:
        source.close()


def _check(reads: list[Read]) -> list[Read]:
    for read in reads:
        if read.error is not None:
            raise read.error
    return reads


@dataclass(frozen=True)
class Memory:
    """Bytes that are held whatever the device cache: of weights, keys and values in `dtype`, and the host cache."""

    dtype: str
    weights: str  # how they are held
    layers: int
    embedding: int
    kv: int
    kv_tokens: int
    factors: int  # of a lowrank table
    host_cache: int = 0

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.kv + self.factors + self.host_cache


@dataclass(frozen=True)
class Row:
    """One device cache size at one number of sequences. Figures of the last kind are means of a step; None where they
    cannot be told: a cache smaller than a step, or a disk that was not measured."""

    slots: int
    share: float  # of the vocabulary
    device_bytes: int
    total_bytes: int  # with everything in Memory
    sequences: int
    step_ms: float
    hit_rate: float | None = None
    lookups: float | None = None
    host_fills: float | None = None
    disk_fills: float | None = None
    read_bytes: float | None = None
    steps_with_reads: float | None = None
    stall_ms: float | None = None
    stall_p99_ms: float | None = None
    stall_share: float | None = None  # of the step without it


@dataclass(frozen=True)
class Plan:
    model: dict[str, Any]
    memory: Memory
    table: TableShape | None = None
    disk: DiskSpeed | None = None
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        raw["memory"]["total"] = self.memory.total
        return raw


def cache_sizes(shape: TableShape, ffn_bytes: int, given: Sequence[str]) -> list[int]:
    """Slots to plan for, rising: 1, 5, 10 and 20% of the vocabulary, a quarter of the feed-forward networks' own bytes,
    and those given. Raises PlanError for a given one that cannot be."""
    asked = {shape.slots(size) for size in given}
    if 0 in asked:
        raise PlanError("--device-cache 0: at least one record must fit")
    usual = {min(ffn_bytes // 4 // shape.record_bytes, shape.vocab_size)}
    usual |= {int(share * shape.vocab_size) for share in _SHARES}
    return sorted(usual - {0} | asked)


def default_step_ms(sequences: int) -> float:
    return _STEP_MS + (sequences - 1) * _STEP_MS_PER_SEQUENCE


class Estimate(Protocol):
    """What a step asks of the tiers under a device cache of `slots`; None where `slots` do not hold a step."""

    def __call__(self, slots: int, sequences: int) -> Demand | None: ...

    @property
    def note(self) -> str: ...


def add_tiers(
    plan: Plan,
    slots: Sequence[int],
    sequences: Sequence[int],
    step_ms: float | None,
    disk: DiskSpeed | None,
    estimate: Estimate,
    progress: Callable[[int, int], object],
) -> Plan:
    """One row per size and number of sequences, and what they assume. `step_ms` None is a GPU's."""
    if plan.table is None:
        raise ValueError("a plan without a table has no tiers")
    rows = []
    pairs = list(product(slots, dict.fromkeys(sequences)))
    for done, (size, together) in enumerate(pairs):
        progress(done, len(pairs))
        step = default_step_ms(together) if step_ms is None else step_ms
        held, figures = size * plan.table.slot_bytes, {}
        # The pager keeps some slots free between steps: its hits are those of a tier without them.
        if (asked := estimate(size - spare_slots(size, plan.table.vocab_size), together)) is not None:
            figures = _figures(asked, plan.table.read_bytes, disk, step, plan.model["num_hidden_layers"])
        share = size / plan.table.vocab_size
        rows.append(Row(size, share, held, held + plan.memory.total, together, step, **figures))
    progress(len(pairs), len(pairs))
    return replace(plan, disk=disk, rows=rows, notes=[estimate.note, *_notes(rows, disk, step_ms)])


def _notes(rows: Sequence[Row], disk: DiskSpeed | None, step_ms: float | None) -> list[str]:
    if disk is None:
        notes = ["Stall: unknown. There is no table yet, so the disk was not measured."]
    else:
        steps = "A step is a GPU's; --step-ms gives your own" if step_ms is None else "A step is as given"
        notes = [
            "Stall: n reads of a step take one read's median latency and n - 1 times their bytes at the disk's "
            "throughput; what exceeds a layer's share of the step is waited for, since the first layer needs its rows "
            f"then. Fills from the host tier count as no wait. {steps}."
        ]
    if any(row.hit_rate is None for row in rows):
        notes.append("-: the device cache is smaller than a step's records; the server would split steps.")
    return [*notes, PROCESS_NOTE]


def _figures(asked: Demand, read_bytes: float, disk: DiskSpeed | None, step_ms: float, layers: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "hit_rate": asked.hit_rate,
        "lookups": asked.lookups,
        "host_fills": asked.host,
        "disk_fills": asked.disk,
        "read_bytes": asked.disk * read_bytes,
        "steps_with_reads": float(1 - asked.reads[0]),
    }
    if disk is not None:
        # The first layer needs its rows when it has run; what comes later is waited for.
        stalls = [max(0.0, disk.seconds(n, read_bytes) * 1000 - step_ms / layers) for n in range(len(asked.reads))]
        mean = float(np.dot(stalls, asked.reads))
        p99 = stalls[min(int(np.searchsorted(asked.reads.cumsum(), 0.99)), len(stalls) - 1)]
        figures |= {"stall_ms": mean, "stall_p99_ms": p99, "stall_share": mean / step_ms}
    return figures


def render(plan: Plan) -> str:
    """For people: an aligned table, and what it assumes."""
    model, memory = plan.model, plan.memory
    lines = [
        f"model   {model['path']}: {model['ffn_variant']}, {model['num_hidden_layers']} layers of "
        f"{model['hidden_size']:,}, {model['vocab_size']:,} tokens",
        f"memory  attention and norms        {amount(memory.layers):>9}  {memory.weights}",
        f"        embedding and output head  {amount(memory.embedding):>9}  {memory.weights}",
        f"        keys and values            {amount(memory.kv):>9}  {memory.dtype}, {memory.kv_tokens:,} tokens",
        f"        factors of the table       {amount(memory.factors):>9}  of a lowrank one",
        f"        host cache                 {amount(memory.host_cache):>9}  in RAM",
        f"        together                   {amount(memory.total):>9}  and the device cache",
    ]
    if plan.table is not None:
        table = plan.table
        lines.append(
            f"table   {table.path or 'not built yet'}: {table.encoding}, record {table.record_bytes:,} B, a read "
            f"moves {table.read_bytes:,.0f} B, {amount(table.vocab_size * table.record_stride)} in all"
        )
    if (disk := plan.disk) is not None:
        lines.append(
            f"disk    {disk.io} reads, page cache {disk.page_cache}; one alone p50 {disk.p50_ms:.2f} ms, "
            f"p99 {disk.p99_ms:.2f} ms; {disk.outstanding} at once {amount(disk.bytes_per_second)}/s"
        )
    if plan.rows:
        lines += ["", *_rows(plan.rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in plan.notes)])


def _rows(rows: Sequence[Row]) -> list[str]:
    lines = [
        f"{'device cache':<27}{'resident':>10}{'seqs':>6}{'step':>9}{'hit rate':>10}{'fills per step':>17}{'reads':>12}"
        f"{'stall per step':>30}",
        f"{'records':>9}{'of V':>7}{'bytes':>11}{'in all':>10}{'':>25}{'host':>8}{'disk':>9}{'per step':>12}"
        f"{'mean':>10}{'p99':>10}{'of step':>10}",
    ]
    for row in rows:
        lines.append(
            f"{row.slots:>9,}{row.share:>7.1%}{amount(row.device_bytes):>11}{amount(row.total_bytes):>10}"
            f"{row.sequences:>6}{row.step_ms:>6.2f} ms{_or_dash(row.hit_rate, '.1%'):>10}"
            f"{_or_dash(row.host_fills, '.3f'):>8}{_or_dash(row.disk_fills, '.3f'):>9}"
            f"{'-' if row.read_bytes is None else amount(row.read_bytes):>12}"
            f"{_or_dash(row.stall_ms, '.3f', ' ms'):>10}{_or_dash(row.stall_p99_ms, '.3f', ' ms'):>10}"
            f"{_or_dash(row.stall_share, '.1%'):>10}"
        )
    return lines


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def amount(size: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
