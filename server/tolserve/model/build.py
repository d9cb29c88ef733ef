"""Tabulation: run every memory FFN once over the vocabulary and write the results as a table (paper eq. 2.9)."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tolserve.model.checkpoint import (
    FINGERPRINT_KEY,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    is_memory_tensor,
    read_fingerprint,
    save_checkpoint,
    save_tensors,
)
from tolserve.model.config import ModelConfig
from tolserve.model.lowrank import RankChoice, compute_factors, directions
from tolserve.model.networks import TOKENS_PER_BATCH, MemoryNetworks
from tolserve.model.quantise import encode_rows
from tolserve.tol.encoding import GROUP_SIZE, GROUP_STEP, LOWRANK_GROUP_SIZE, Encoding, EncodingError, Values
from tolserve.tol.factors import Factors
from tolserve.tol.manifest import Manifest
from tolserve.tol.table import Bytes, TableError
from tolserve.tol.writer import PartialFolder, TableWriter

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


def _quiet(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class BuildOptions:
    """How a table is to be encoded. `group_size` None takes the default; `rank` or `energy` make it lowrank.

    Raises EncodingError for options that exclude each other or mean nothing.
    """

    values: Values = "bf16"
    group_size: int | None = None
    rank: int | None = None
    energy: float | None = None
    dropped_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise EncodingError("--rank and --energy exclude each other: give one")
        if self.group_size is not None and self.values == "bf16":
            raise EncodingError("--group-size: bf16 rows have no scales; give --encoding int8 or int4 too")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise EncodingError(f"--energy {self.energy}: it must be above 0 and at most 1")

    @property
    def lowrank(self) -> bool:
        return self.rank is not None or self.energy is not None

    def encoding(self, ranks: tuple[int, ...] | None) -> Encoding:
        default = LOWRANK_GROUP_SIZE if self.lowrank else GROUP_SIZE
        return Encoding(self.values, None if self.values == "bf16" else self.group_size or default, ranks)

    def layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Layers with rows. Raises EncodingError for options that do not fit the model's shape."""
        if self.rank is not None and not 0 < self.rank <= config.hidden_size:
            raise EncodingError(f"--rank {self.rank}: the model's rows have {config.hidden_size} values")
        step = self.encoding(None).group_size or GROUP_STEP
        if self.lowrank and step > config.hidden_size:
            raise EncodingError(f"--group-size {step}: the model's rows have {config.hidden_size} values")
        if self.rank is not None and self.rank % step:
            above = (self.rank // step + 1) * step
            raise EncodingError(f"--rank {self.rank}: it must be a multiple of {step}, such as {above}")
        known = range(config.num_hidden_layers)
        if unknown := [layer for layer in self.dropped_layers if layer not in known]:
            raise EncodingError(f"--drop-layers {unknown[0]}: the model's layers are 0 to {known[-1]}")
        kept = tuple(layer for layer in known if layer not in self.dropped_layers)
        if not kept or len(kept) + len(self.dropped_layers) != len(known):
            raise EncodingError(f"--drop-layers {self.dropped_layers}: name each layer once, and keep at least one")
        return kept


PLAIN = BuildOptions()


@torch.inference_mode()
def compute_records(
    networks: MemoryNetworks, manifest: Manifest, factors: Factors | None, first: int = 0
) -> Iterator[Bytes]:
    """Records of the tokens from `first` on, a batch's first, as uint8 [n, record_bytes] per batch.

    Networks run in float32 whatever the checkpoint's precision; each row, or its coordinates in the layer's factor,
    is rounded once, by its encoding.
    """
    along = directions(factors, manifest.layers) if factors is not None else None
    for tokens in networks.batches():
        if tokens.start < first:
            continue
        records = np.empty((len(tokens), manifest.record_bytes), np.uint8)
        for layer in manifest.layers:
            rows = networks.rows(layer, tokens)
            group, layout = manifest.row_layout(layer)
            encoded = encode_rows(rows if along is None else rows @ along[layer].T, manifest.encoding).numpy()
            start = manifest.groups[group].offset + layout.offset
            records[:, start : start + encoded.shape[1]] = encoded
        yield records


def build_table(
    model_dir: Path, out: Path, options: BuildOptions = PLAIN, *, force: bool = False, progress: Progress = _quiet
) -> Manifest:
    """Tabulate a model with memory tensors into the folder `out`, which appears only when complete.

    A build that is interrupted, or that fails, leaves what it has in `.NAME.partial` beside `out`; the next one with
    the same model and options goes on from there, another one starts over. On one machine the table is the same,
    byte for byte, however often its build was interrupted. `progress` counts tokens, in both passes of a lowrank table.

    Raises CheckpointError for a model without memory tensors, EncodingError for options that do not fit its shape,
    TableError when `out` exists and `force` is not given, when another build is writing there, or when the disk does
    not take the table.
    """
    if out.exists() and not force:
        raise TableError(f"{out} exists; give --force to replace it once the new table is complete")
    config = ModelConfig.load(model_dir)
    layers = options.layers(config)
    if not options.lowrank:
        options.encoding(None).widths(len(layers), config.hidden_size)
    networks = MemoryNetworks(model_dir, layers)
    fingerprint = read_fingerprint(model_dir)
    partial = PartialFolder(out)
    try:
        return _build(networks, fingerprint, options, layers, partial, progress)
    except OSError as error:
        raise TableError(
            f"the table could not be written: {error}; what there is stays in {partial.path}, and the same command "
            "goes on from there"
        ) from error
    finally:
        partial.close()


def _build(
    networks: MemoryNetworks,
    fingerprint: str,
    options: BuildOptions,
    layers: tuple[int, ...],
    partial: PartialFolder,
    progress: Progress,
) -> Manifest:
    config, factors, passed = networks.config, None, 0
    total = config.vocab_size * (2 if options.lowrank else 1)
    if options.lowrank:
        choice = RankChoice(options.rank, options.energy, options.encoding(None).group_size or GROUP_STEP)
        factors = partial.kept_factors(fingerprint, choice.describe(layers))
        if factors is None:
            networks_run = lambda done, of: progress(done * config.vocab_size // of, total)  # noqa: E731
            factors = compute_factors(networks, layers, choice, networks_run)
        passed = config.vocab_size
    writer = TableWriter(
        partial.target,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        fingerprint=fingerprint,
        encoding=options.encoding(factors.ranks if factors is not None else None),
        dropped_layers=options.dropped_layers,
        factors=factors,
        partial=partial,
        batch=TOKENS_PER_BATCH,
    )
    try:
        for records in compute_records(networks, writer.manifest, factors, writer.written):
            writer.write(records)
            progress(passed + writer.written, total)
        return writer.finish()
    finally:
        writer.close()


def stamp(model_dir: Path) -> str:
    """Store the fingerprint in the checkpoint's metadata if it is not there yet, and return it.

    A checkpoint written elsewhere carries none; without the stamp every start would have to hash its weights. One in
    several files, or in a folder that cannot be written, is left as it is.
    """
    fingerprint = read_fingerprint(model_dir)
    path = model_dir / WEIGHTS
    checkpoint = Checkpoint(model_dir)
    if FINGERPRINT_KEY not in checkpoint.metadata and path.exists() and os.access(model_dir, os.W_OK):
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint.names()}
        save_tensors(path, tensors, checkpoint.metadata | {FINGERPRINT_KEY: fingerprint})
    return fingerprint


def export(model_dir: Path, out: Path, *, progress: Progress = _quiet) -> Manifest:
    """Write a serving model directory: the checkpoint without its memory tensors, and its table under `out`/tol.

    One that was interrupted while it built the table goes on.
    """
    config = ModelConfig.load(model_dir)
    if out.exists() and any(path.name != ".tol.partial" for path in out.iterdir()):
        raise CheckpointError(f"{out} is not empty; export into a new folder")
    out.mkdir(parents=True, exist_ok=True)
    manifest = build_table(model_dir, out / "tol", progress=progress)
    checkpoint = Checkpoint(model_dir)
    kept = {name: checkpoint.read(name) for name in sorted(checkpoint.names()) if not is_memory_tensor(name)}
    save_checkpoint(out, config, kept, manifest.fingerprint)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (model_dir / name).exists():
            shutil.copy2(model_dir / name, out / name)
    return manifest
