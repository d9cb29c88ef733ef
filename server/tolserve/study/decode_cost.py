"""What the five variants cost to decode with: memory and ms a token, predicted and measured (paper Table 6).

Predicted is what `tolserve table plan` would say: bytes from the shapes alone; time from the bytes that a token has
read, at the rate at which this machine's kernel reads one large matrix, and the wait for records from disk. Measured is
the whole engine, over random weights and a random table. Next tokens are forced: independent ones, as frequent as Zipf
has them in tol/estimate.py.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tolkernels import linear, make_weight
from tolserve.engine.assemble import BLOCK_SIZE, choose_device
from tolserve.engine.config import EngineSettings
from tolserve.engine.footprint import footprint
from tolserve.engine.kv import KVCache
from tolserve.model.config import ModelConfig
from tolserve.model.serving import Precision
from tolserve.study.compare import Shape, variant_config
from tolserve.study.forced import ForcedEngine, Text, Trace
from tolserve.study.pictures import panels
from tolserve.study.random_model import random_model, shape_of
from tolserve.study.random_table import table_of
from tolserve.study.report import Study, StudyError, device_name, provenance
from tolserve.study.tasks import quiet
from tolserve.tol.estimate import FromCounts, zipf
from tolserve.tol.plan import DiskSpeed, Memory, Plan, Row, TableShape, add_tiers, measure_disk
from tolserve.tol.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# As in the paper's Table 6.
ORDER = ("base", "flex-1", "flex-2", "flex-3", "memory")
DTYPE = torch.bfloat16  # of weights, keys and values, as in the paper
# Of the matrix whose reading is timed. It is as large as base's layers, so that a cache helps both alike; past this
# size no cache helps.
_MOST_READ = 1 << 30
_DISK_ROOM = 1.05  # beside records a table has checksums, and other programs write too
_NO_MODEL = os.devnull  # a folder without weights: the footprint then takes them to be in DTYPE
# From the start a device cache holds what is most frequent in a history of so many tokens for each in the vocabulary.
# Then so many lookups give its policy something to go by.
_HISTORY = 20
_WARM_LOOKUPS = 2_000


@dataclass(frozen=True)
class Setup:
    """How the variants run: one sequence, whose first `context` tokens are a prompt. Each of `rounds` gives every
    variant a turn of `steps` timed ones. `device` and `device_cache` are as of `tolserve serve`."""

    device: str = "auto"
    device_cache: str = "10%"
    context: int = 64
    steps: int = 16
    rounds: int = 7
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens that the sequence comes to have; a turn begins with a step that is not timed."""
        return self.context + (self.steps + 1) * self.rounds + 1


@dataclass(frozen=True)
class Predicted:
    """Bytes held; bytes that a token has read from memory; what the plan says of a variant with a table."""

    memory: Memory
    cache: int
    read: int
    tiers: Row | None

    @property
    def held(self) -> int:
        return self.memory.total + self.cache

    def ms(self, rate: float) -> float:
        """Of a token; `rate` in bytes/s."""
        stall = self.tiers.stall_ms if self.tiers is not None else None
        return 1000 * self.read / rate + (stall or 0.0)


@dataclass(frozen=True)
class Measured:
    """By variant: seconds a token of each round, what the counters counted, bytes of the engine's own tensors. And of
    the machine: the rate of each round, bytes/s."""

    seconds: dict[str, list[float]]
    counted: dict[str, dict[str, float]]
    held: dict[str, int]
    rates: list[float]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def ms(self, name: str) -> list[float]:
        return [1000 * seconds for seconds in self.seconds[name]]

    def over(self, name: str, other: str) -> float:
        """How many times as long a token takes: the median over rounds, so that a slow minute counts for both."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))

    def hit_rate(self, name: str) -> float | None:
        lookups = self.counted[name].get("tol_lookups_total")
        return self.counted[name]["tol_hits_total"] / lookups if lookups else None


def shapes(shape: Shape) -> dict[str, ModelConfig]:
    """The five variants at a shape, with as many parameters in all. Raises ConfigError for a shape that cannot be."""
    return {name: variant_config(name, shape, BLOCK_SIZE) for name in ORDER}


def preset_shapes(size: str, vocab_size: int | None = None) -> dict[str, ModelConfig]:
    """The five variants at a size of the paper's, with another vocabulary if asked. Raises KeyError."""
    return {name: shape_of(size, name, vocab_size) for name in ORDER}


def run(
    configs: Mapping[str, ModelConfig], setup: Setup, folder: Path, progress: Callable[[int, int], None] = quiet
) -> Study:
    """One row per variant of `shapes` or `preset_shapes`. A random table lies in a folder inside `folder` meanwhile.

    Raises SettingsError for a device that is not there, PlanError for a cache size that cannot be, StudyError for a
    cache of no records and for a disk without room, ConfigError for a shape that no kernel takes.
    """
    # An engine here has one block of keys and values more than its longest sequence takes.
    room = setup.longest + BLOCK_SIZE
    configs = {name: replace(config, max_position_embeddings=room) for name, config in configs.items()}
    setup = replace(setup, device=choose_device(setup.device))
    shape = _table_shape(configs["memory"], setup.device_cache)
    slots, load = shape.slots(setup.device_cache), os.getloadavg()[0]
    total = len(configs) * (1 + setup.rounds)
    with ExitStack() as held:
        table = held.enter_context(_table(configs["memory"], shape, folder))
        disk = measure_disk(table)
        history, coming = _tokens(shape.vocab_size, setup)
        engines: dict[str, ForcedEngine] = {}
        for name, config in configs.items():
            progress(len(engines), total)
            engine = _engine(config, table if config.has_memory else None, slots, setup)
            engines[name] = held.enter_context(closing(engine))
            engine.warm(history, _WARM_LOOKUPS)
        reader = _Reader(configs["base"], setup.device)
        measured = _measure(engines, reader, Text(coming, 1, setup.context), setup, progress)
        pager = engines["memory"].engine.pager
        reads = pager.disk.describe() if pager is not None else ""
    predicted = {name: _predict(config, shape, slots, setup, disk, measured.rate) for name, config in configs.items()}
    facts = {
        "shapes": {name: config.to_dict() for name, config in configs.items()},
        "setup": asdict(setup),
        "device": device_name(setup.device),
        "load_before": round(load, 1),
        "table": asdict(shape) | {"slots": slots},
        "disk": asdict(disk),
        "reads": reads,
        "bytes_per_second": {"median": measured.rate, "by_round": measured.rates},
    }
    rows = [_row(name, predicted[name], measured) for name in configs]
    extra = {name: _details(name, predicted[name], measured) for name in configs}
    return Study("decode-cost", facts | provenance(setup.seed), rows, extra, _notes(facts, measured.rate))


def _table_shape(config: ModelConfig, device_cache: str) -> TableShape:
    names = ("vocab_size", "num_hidden_layers", "hidden_size")
    shape = TableShape.to_be_built("bf16", **{name: getattr(config, name) for name in names})
    if shape.slots(device_cache) < 1:
        raise StudyError(f"--device-cache {device_cache}: at least one record must fit")
    return shape


def _tokens(vocab_size: int, setup: Setup) -> tuple[Trace, Trace]:
    """Independent tokens by Zipf's law, those of the past and those that will be run; which ones are frequent is random
    too."""
    random = np.random.default_rng(setup.seed)
    weights = zipf(vocab_size)
    past = max(_HISTORY * vocab_size, _WARM_LOOKUPS)
    ranks = random.choice(vocab_size, size=past + setup.longest, p=weights / weights.sum())
    tokens = random.permutation(vocab_size)[ranks].astype(np.int64)
    return tokens[:past], tokens[past:]


@contextmanager
def _table(config: ModelConfig, shape: TableShape, folder: Path) -> Iterator[Table]:
    """A table of random records, for as long as the block runs. Raises StudyError where the disk has no room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = shape.vocab_size * shape.record_stride, shutil.disk_usage(folder).free
    if needed * _DISK_ROOM > free:
        raise StudyError(
            f"the random table takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free; give --out a "
            "folder on another disk, or a smaller --vocab-size"
        )
    with TemporaryDirectory(prefix="decode-cost-", dir=folder) as temporary:
        yield table_of(Path(temporary), "bf16", config)


def _engine(config: ModelConfig, table: Table | None, slots: int, setup: Setup) -> ForcedEngine:
    model = random_model(config, dtype=DTYPE, device=setup.device)
    return ForcedEngine(model, table, slots=slots, sequences=1, longest=setup.longest, dtype=DTYPE)


class _Reader:
    """Reads one large matrix with the kernel that a decode step reads its matrices with."""

    def __init__(self, base: ModelConfig, device: str) -> None:
        precision = Precision(DTYPE, device=device)
        layers = base.num_hidden_layers * (4 * base.hidden_size + 3 * base.intermediate_size)  # rows of `hidden_size`
        rows = min(layers, _MOST_READ // (base.hidden_size * DTYPE.itemsize))
        noise = torch.randn(1, base.hidden_size, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        matrix = noise.to(device, DTYPE).expand(rows, -1).contiguous()
        self._weight = make_weight(matrix, precision.matrix(DTYPE))
        self._x = torch.ones(1, base.hidden_size, dtype=precision.activations, device=device)

    def rate(self, reads: int) -> float:
        """Bytes/s over so many reads, timed as a variant's turn is: the machine is as busy for both."""
        self._read(1)
        started = time.perf_counter()
        self._read(reads)
        return reads * self._weight.nbytes / (time.perf_counter() - started)

    def _read(self, times: int) -> None:
        for _ in range(times):
            linear(self._x, self._weight)
        if self._x.is_cuda:
            torch.cuda.synchronize()


def _measure(
    engines: Mapping[str, ForcedEngine],
    reader: _Reader,
    text: Text,
    setup: Setup,
    progress: Callable[[int, int], None],
) -> Measured:
    """The variants take turns, and another one begins each round."""
    names = list(engines)
    for engine in engines.values():
        engine.start(text.prompts)
    before = {name: engine.counters() for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for turn in range(setup.rounds):
        tokens = text.take(1 + setup.steps)
        rates.append(reader.rate(setup.steps))
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds_per_token(engines[name], tokens))
        progress(len(names) * (2 + turn), len(names) * (1 + setup.rounds))
    counted = {
        name: {key: value - before[name].get(key, 0) for key, value in engine.counters().items()}
        for name, engine in engines.items()
    }
    return Measured(seconds, counted, {name: _held(engine) for name, engine in engines.items()}, rates)


def _seconds_per_token(engine: ForcedEngine, tokens: list[list[int]]) -> float:
    """The first step of a turn finds another variant's weights in the processor's caches, and is not timed."""
    engine.timed_steps(tokens[:1])
    before = engine.generated
    spent = sum(engine.timed_steps(tokens[1:]))
    return spent / (engine.generated - before)


def _held(engine: ForcedEngine) -> int:
    held = engine.bytes()
    return held["weights"] + held["device_cache"] + held["factors"] + engine.engine.runner.kv.data.nbytes


def _predict(
    config: ModelConfig, shape: TableShape, slots: int, setup: Setup, disk: DiskSpeed, rate: float
) -> Predicted:
    """By the arithmetic of `tolserve table plan`. A token reads the layers, the output head, the keys and values of the
    sequence at its mean length, and its record."""
    engine = EngineSettings(
        model=_NO_MODEL,
        cache_dir=_NO_MODEL,
        device=setup.device,
        dtype=str(DTYPE).removeprefix("torch."),
        max_num_seqs=1,
    )
    memory = Memory(**vars(footprint(engine, config, None)))
    length = (setup.context + setup.longest) / 2
    per_token = KVCache.bytes_per_block(config, BLOCK_SIZE, DTYPE) / BLOCK_SIZE
    read = memory.layers + memory.embedding + round(length * per_token)
    if not config.has_memory:
        return Predicted(memory, 0, read, None)
    read += shape.record_bytes
    plan = Plan({"num_hidden_layers": config.num_hidden_layers}, memory, shape)
    estimate = FromCounts(None, shape.vocab_size, "context", 0)
    (tiers,) = add_tiers(plan, [slots], [1], 1000 * read / rate, disk, estimate, quiet).rows
    return Predicted(memory, tiers.device_bytes, read, tiers)


def _row(name: str, predicted: Predicted, measured: Measured) -> dict[str, Any]:
    """MB are millions of bytes, ms those of a token: the median of rounds, the least and the most."""
    memory, ms = predicted.memory, measured.ms(name)
    return {
        "variant": name,
        "weights MB": (memory.layers + memory.embedding) / 1e6,
        "cache MB": predicted.cache / 1e6,
        "kv MB": memory.kv / 1e6,
        "predicted MB": predicted.held / 1e6,
        "MB": measured.held[name] / 1e6,
        "predicted ms": predicted.ms(measured.rate),
        "ms": statistics.median(ms),
        "min": min(ms),
        "max": max(ms),
        "over base": measured.over(name, "base"),
    }


def _details(name: str, predicted: Predicted, measured: Measured) -> dict[str, Any]:
    return {
        "predicted": asdict(predicted) | {"held": predicted.held, "ms": predicted.ms(measured.rate)},
        "held": measured.held[name],
        "ms_by_round": measured.ms(name),
        "hit_rate": measured.hit_rate(name),
        "counted": measured.counted[name],
    }


def _notes(facts: Mapping[str, Any], rate: float) -> list[str]:
    versions, disk = provenance(), facts["disk"]
    return [
        f"{facts['device']}, {versions['threads']} threads, load {facts['load_before']} before; one matrix is read at "
        f"{rate / 1e9:.1f} GB/s.",
        f"Records: {facts['reads']}; one read alone takes {disk['p50_ms']:.2f} ms (p99 {disk['p99_ms']:.2f}).",
        "Predicted ms leave out what a step does beside reading: launches, norms, attention's own work, sampling.",
    ]


def draw(study: Study, figure: "Figure") -> None:
    """Memory and time, a pair of bars for each variant; whiskers go from the fastest round to the slowest."""
    names, places = [row["variant"] for row in study.rows], np.arange(len(study.rows))
    units = ("MB", "ms")
    for axes, unit, title in zip(panels(figure, units), units, ("memory, MB", "a token, ms"), strict=True):
        predicted, found = ([row[key] for row in study.rows] for key in (f"predicted {unit}", unit))
        axes.bar(places - 0.2, predicted, 0.4, label="predicted", color="C7")
        axes.bar(places + 0.2, found, 0.4, label="measured", color="C0")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(places, names)
        axes.legend(fontsize=8)
    spread = [[row["ms"] - row["min"] for row in study.rows], [row["max"] - row["ms"] for row in study.rows]]
    axes.errorbar(places + 0.2, found, yerr=spread, fmt="none", ecolor="k", capsize=3)
