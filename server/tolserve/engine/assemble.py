"""From settings to a running engine: model, table, tiers, KV blocks, scheduler."""

import fcntl
import logging
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tolkernels import DTYPES
from tolserve.engine.ahead import LookaheadEngine
from tolserve.engine.blocks import BlockPool
from tolserve.engine.config import EngineSettings
from tolserve.engine.engine import Engine
from tolserve.engine.graphs import Decoder
from tolserve.engine.kv import KVCache
from tolserve.engine.packs import PackStore
from tolserve.engine.runner import Runner
from tolserve.engine.scheduler import Scheduler
from tolserve.metrics import Metrics
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.checkpoint import Checkpoint, read_fingerprint
from tolserve.model.config import ModelConfig
from tolserve.model.pack import Target
from tolserve.model.serving import ServingModel
from tolserve.tol.encoding import values_of
from tolserve.tol.frequencies import Counts, most_frequent, read_frequencies
from tolserve.tol.pager import Pager
from tolserve.tol.policy import NEED_FREQUENCIES
from tolserve.tol.recorder import CountFile, Recorder, TraceFile
from tolserve.tol.size import parse_bytes, parse_cache_size
from tolserve.tol.table import Table, TableError
from tolserve.tol.watch import TableWatch, stamps_of

log = logging.getLogger(__name__)

BLOCK_SIZE = 16  # tokens; vLLM's default: half a block is wasted per sequence, and tables stay short
# "auto" gives every sequence its longest context, up to this. On the CPU untouched blocks cost no RAM.
AUTO_KV_BYTES = 2 * 2**30

# Records that prompts may miss in a step that decodes, and as many may be on their way from earlier steps. A cold read
# takes about .1 ms (98,304 bytes at 1 GB/s; small records hardly less). On CUDA decodes then wait for 1.6 ms longer at
# most, about a step's own 1-2 ms; on the CPU for 26 ms of the 1B shape's 100. The demo model's steps are shorter, but
# there a prompt computes as long as it reads, and smaller pieces only delay it: with 32, 64, 128 its cold prompts took
# 1.5, 1.2, 0.8 times as long to their first token as without a budget (benchmarks/arrivals.py, a busy machine).
MAX_FILLS = {"cpu": 128, "cuda": 8}


class SettingsError(ValueError):
    """Settings that do not fit this model or machine; the message names the option and says what to do."""


def assemble(settings: EngineSettings, ahead: bool | None = None) -> Engine:
    """Load everything a server needs. `ahead`: launch steps ahead of the host's knowledge; None is what `runs_ahead`
    says.

    Raises ConfigError, CheckpointError, TableError, SettingsError or MemoryError with one clear line.
    """
    model_dir = Path(settings.model)
    config = ModelConfig.load(model_dir)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    max_len = longest_context(settings, config)
    metrics = Metrics()
    table = _table(settings, model_dir, config)
    watch = TableWatch(stamps_of(table), metrics) if table is not None else None
    blocks = kv_blocks(settings, config, dtype, max_len)
    packs = _packs(settings, table, device, metrics)
    recorder = _recorder(settings, config)
    model = ServingModel.load(model_dir, dtype=dtype, weights=settings.weights, device=device)
    log.info("weights: %.1f MB, output head in %s", model.nbytes / 1e6, model.head.encoding)
    ahead = runs_ahead(device) if ahead is None else ahead
    held = allocated_blocks(blocks, ahead)
    kv = KVCache(config, blocks=held, block_size=BLOCK_SIZE, max_len=max_len, dtype=dtype, device=device)
    with ExitStack() as undo:
        # Last: a table in shared memory is there for others too, and must not stay behind when something else fails.
        pager = _pager(settings, table, device, metrics, ahead) if table is not None else None
        if pager is not None:
            undo.callback(pager.close)
        runner = Runner(model, kv, pager)
        make = partial(LookaheadEngine, decoder=_decoder(settings, runner, spare=blocks)) if ahead else Engine
        engine: Engine = make(
            runner,
            _scheduler(settings, BlockPool(blocks, BLOCK_SIZE), pager, device),
            metrics,
            max_model_len=max_len,
            max_queue=settings.max_queue,
            recorder=recorder,
            watch=watch,
            packs=packs,
            counts=_frequencies(settings, config.vocab_size),
        )
        undo.pop_all()
    return engine


def runs_ahead(device: str) -> bool:
    """Whether steps are launched ahead of the host's knowledge. The CPU computes nothing meanwhile, so there it would
    only cost the void steps."""
    return device == "cuda"


def allocated_blocks(blocks: int, ahead: bool) -> int:
    """KV blocks in memory where sequences have `blocks`. One more with steps ahead: what pads a step writes there."""
    return blocks + ahead


def _scheduler(settings: EngineSettings, pool: BlockPool, pager: Pager | None, device: str) -> Scheduler:
    return Scheduler(
        pool,
        max_seqs=settings.max_num_seqs,
        max_tokens=settings.max_num_batched_tokens,
        max_distinct=pager.slots if pager is not None else None,
        present=pager.present if pager is not None else None,
        max_fills=MAX_FILLS[device],
        prefix_cache=settings.prefix_cache,
    )


def _packs(settings: EngineSettings, table: Table | None, device: str, metrics: Metrics) -> PackStore | None:
    if settings.packs is None:
        return None
    folder = Path(settings.packs)
    if table is None:
        raise SettingsError("--packs: a base model has no table that packs could change")
    if not folder.is_dir():
        raise SettingsError(f"--packs {folder}: there is no such folder")
    manifest = table.manifest
    target = Target(manifest.fingerprint, manifest.vocab_size, manifest.num_layers, manifest.hidden_size)
    return PackStore(folder, parse_bytes(settings.pack_memory), target, torch.device(device), metrics)


def _decoder(settings: EngineSettings, runner: Runner, spare: int) -> Decoder:
    """Takes what is left of the device's memory, so it is the first to find none."""
    try:
        return Decoder(runner, max_rows=settings.max_num_seqs, spare=spare)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise SettingsError(
            f"--device-cache {settings.device_cache} and --kv-cache {settings.kv_cache} leave no room for the steps "
            f"themselves: give less to one of them, or a smaller --max-num-seqs ({error})"
        ) from error


def choose_device(name: str) -> str:
    """What "auto" is here. Raises SettingsError for a device that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no CUDA device here; use --device cpu")
    return name


def choose_dtype(name: str, device: str) -> torch.dtype:
    """float32 on the CPU, whose results are the most exact and whose kernels compute in it anyway; bfloat16 on CUDA."""
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return DTYPES[name]


def longest_context(settings: EngineSettings, config: ModelConfig) -> int:
    """Tokens of prompt and answer. Raises SettingsError for more than the model has positions."""
    limit = config.max_position_embeddings
    asked = settings.max_model_len or limit
    if asked > limit:
        raise SettingsError(f"--max-model-len {asked}: the model was trained for at most {limit} positions")
    return asked


def kv_blocks(settings: EngineSettings, config: ModelConfig, dtype: torch.dtype, max_len: int) -> int:
    """Blocks of keys and values that are allocated. Raises SettingsError if not one sequence fits."""
    per_block = KVCache.bytes_per_block(config, BLOCK_SIZE, dtype)
    least = -(-max_len // BLOCK_SIZE)
    if settings.kv_cache == "auto":
        return max(least, min(least * settings.max_num_seqs, AUTO_KV_BYTES // per_block))
    blocks = parse_bytes(settings.kv_cache) // per_block
    if blocks < least:
        raise SettingsError(
            f"--kv-cache {settings.kv_cache} holds {blocks * BLOCK_SIZE} tokens; one sequence of --max-model-len "
            f"{max_len} needs {least * per_block} bytes"
        )
    return blocks


def _table(settings: EngineSettings, model_dir: Path, config: ModelConfig) -> Table | None:
    """None for a base model, which has none."""
    if config.has_memory:
        return find_table(settings, model_dir, config)
    for option in ("table", "tol_frequencies", "tol_save_frequencies", "tol_trace"):
        if (given := getattr(settings, option)) is not None:
            raise SettingsError(f"--{option.replace('_', '-')} {given}: a base model has no table")
    return None


def _pager(settings: EngineSettings, table: Table, device: str, metrics: Metrics, mapped: bool) -> Pager:
    manifest = table.manifest
    device_slots = parse_cache_size(settings.device_cache, manifest.record_bytes, manifest.vocab_size)
    if device_slots < 1:
        raise SettingsError(f"--device-cache {settings.device_cache}: at least one record must fit")
    counts = _frequencies(settings, manifest.vocab_size)
    frequent = most_frequent(counts) if counts is not None else None
    if frequent is None and settings.tol_policy in NEED_FREQUENCIES:
        raise SettingsError(f"--tol-policy {settings.tol_policy} needs --tol-frequencies (`tolserve table freq`)")
    pager = Pager(
        table,
        device_slots=device_slots,
        host_slots=parse_cache_size(settings.host_cache, manifest.record_bytes, manifest.vocab_size),
        device=device,
        policy=settings.tol_policy,
        frequent=frequent,
        io=settings.tol_io,
        read_depth=settings.tol_read_depth,
        mapped=mapped,
        metrics=metrics,
    )
    log.info("table %s: room for %d of %d records in the device tier", table.path, pager.slots, manifest.vocab_size)
    log.info("disk: %s", pager.disk.describe())
    if device_slots >= manifest.vocab_size:
        log.info("filling the device tier")
        pager.preload()
    elif frequent is not None:
        log.info("filling the device tier with the most frequent records")
        pager.preload(frequent)
    return pager


def _frequencies(settings: EngineSettings, vocab_size: int) -> Counts | None:
    """The list of --tol-frequencies. The one that this server keeps itself is empty at its first start."""
    if settings.tol_frequencies is None:
        return None
    path, kept = Path(settings.tol_frequencies), settings.tol_save_frequencies
    if kept is not None and path.absolute() == Path(kept).absolute() and not path.exists():
        return np.zeros(vocab_size, np.int64)
    return read_frequencies(path, vocab_size)


def _recorder(settings: EngineSettings, config: ModelConfig) -> Recorder | None:
    """What the options ask to be recorded, None if nothing. Raises RecorderError for files that cannot be used."""
    counts = trace = None
    if settings.tol_save_frequencies is not None:
        past = _frequencies(settings, config.vocab_size)
        past = past if past is not None else np.zeros(config.vocab_size, np.int64)
        counts = CountFile(Path(settings.tol_save_frequencies), past)
    if settings.tol_trace is not None:
        trace = TraceFile(Path(settings.tol_trace), config.vocab_size)
    return Recorder(counts, trace) if counts is not None or trace is not None else None


def find_table(settings: EngineSettings, model_dir: Path, config: ModelConfig) -> Table:
    """The table to serve from: --table, else MODEL/tol, else the cache folder, where it is built once if it can be.

    Raises TableError for a table of another model, encoding or shape.
    """
    fingerprint = read_fingerprint(model_dir)
    if settings.table is not None:
        return _checked(Table.open(Path(settings.table)), fingerprint, settings, config)
    beside = model_dir / "tol"
    if beside.exists():
        table = Table.open(beside)
        if settings.any_encoding or table.manifest.encoding.name == settings.tol_encoding:
            return _checked(table, fingerprint, settings, config)
        log.info("%s is encoded as %s; looking for %s", beside, table.manifest.encoding.name, settings.tol_encoding)
    cached = Path(settings.cache_dir) / f"{fingerprint}-{settings.tol_encoding}"
    if not cached.exists():
        values, lowrank = values_of(settings.tol_encoding)
        if lowrank:
            raise TableError(
                f"--tol-encoding {settings.tol_encoding}: there is no such table yet, and its rank is yours to choose; "
                f"run `tolserve table build {model_dir} --encoding {values} --rank N --out DIR` and give --table DIR"
            )
        if not Checkpoint(model_dir).has_memory_weights():
            raise TableError(
                f"{model_dir} has neither a {settings.tol_encoding} table under {beside} nor memory tensors to build "
                "one from; give --table, or another --tol-encoding"
            )
        _build(model_dir, cached, BuildOptions(values))
    return _checked(Table.open(cached), fingerprint, settings, config)


def _build(model_dir: Path, path: Path, options: BuildOptions) -> None:
    """Build a table into the cache folder, one process at a time; others wait for it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        if path.exists():
            return
        log.info("building the table once, into %s", path)
        build_table(model_dir, path, options)


def _checked(table: Table, fingerprint: str, settings: EngineSettings, config: ModelConfig) -> Table:
    manifest = table.manifest
    if manifest.fingerprint != fingerprint:
        raise TableError(
            f"{table.path} was built from other weights (fingerprint {manifest.fingerprint}, model {fingerprint}); "
            "build this model's own with `tolserve table build`"
        )
    if manifest.encoding.name != settings.tol_encoding and not settings.any_encoding:
        raise TableError(
            f"{table.path} is encoded as {manifest.encoding.name}, not --tol-encoding {settings.tol_encoding}; give "
            "--tol-encoding its name, or --table another one"
        )
    shape = (manifest.vocab_size, manifest.num_layers, manifest.hidden_size)
    if shape != (config.vocab_size, config.num_hidden_layers, config.hidden_size):
        raise TableError(f"{table.path} has shape {shape}, which is not the model's")
    return table


def use_threads(count: int | None = None) -> None:
    """One compute thread per core this process may use; reader threads only wait for the disk."""
    torch.set_num_threads(count or len(os.sched_getaffinity(0)))
