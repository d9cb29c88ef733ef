"""What an engine would hold, told before there is one: from config.json and headers, with no weights loaded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tolserve.engine.assemble import (
    BLOCK_SIZE,
    allocated_blocks,
    choose_device,
    choose_dtype,
    find_table,
    kv_blocks,
    longest_context,
    runs_ahead,
)
from tolserve.engine.config import EngineSettings
from tolserve.engine.kv import KVCache
from tolserve.model.checkpoint import WEIGHTS, Checkpoint, read_fingerprint
from tolserve.model.config import ModelConfig
from tolserve.model.serving import Precision, weight_sizes
from tolserve.tol.encoding import BF16
from tolserve.tol.manifest import Manifest
from tolserve.tol.table import Table, TableError


@dataclass(frozen=True)
class Footprint:
    """Bytes that `assemble` allocates beside the table's tiers and a step's own; keys and values are in `dtype`."""

    dtype: str
    weights: str  # how the layers' matrices are held, "float32 and int8" if not all alike
    layers: int  # attention, norms, and the FFNs of a base or flex model
    embedding: int  # and the output head, where it is not tied
    kv: int
    kv_tokens: int  # that sequences can have
    factors: int  # of a lowrank table


def footprint(
    settings: EngineSettings, config: ModelConfig, table: Table | None, ahead: bool | None = None
) -> Footprint:
    """`table` is the one to be served from, None if there is none yet; `ahead` is assemble's.

    Raises SettingsError for settings that do not fit the model.
    """
    # A plan makes nothing on the device, so another machine's may be planned for.
    device = settings.device if settings.device == "cuda" else choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    precision = Precision(dtype, settings.weights, device)
    weights = weight_sizes(config, precision, _stored(Path(settings.model), dtype))
    blocks = kv_blocks(settings, config, dtype, longest_context(settings, config))
    held = allocated_blocks(blocks, runs_ahead(device) if ahead is None else ahead)
    ranks = (table.manifest.encoding.ranks if table is not None else None) or ()
    return Footprint(
        dtype=str(dtype).removeprefix("torch."),
        weights=" and ".join(sorted(weights.encodings)),
        layers=weights.layers,
        embedding=weights.embedding,
        kv=held * KVCache.bytes_per_block(config, BLOCK_SIZE, dtype),
        kv_tokens=blocks * BLOCK_SIZE,
        factors=sum(ranks) * config.hidden_size * precision.activations.itemsize,
    )


def ready_table(settings: EngineSettings, model_dir: Path, config: ModelConfig, encoding: str | None) -> Table | None:
    """The table that a start would open, of `encoding` or whichever is there; None where it is still to be built.

    A folder with config.json alone is planned for as well. Raises TableError for a table that does not belong to the
    model, for a given one of another encoding, and where there is neither a table nor what one is built from.
    """
    has_weights = _has_weights(model_dir)
    path = Path(settings.table) if settings.table is not None else model_dir / "tol"
    if settings.table is None and not path.exists():
        if not has_weights:
            return None
        path = Path(settings.cache_dir) / f"{read_fingerprint(model_dir)}-{encoding or BF16.name}"
        if not path.exists():
            if not Checkpoint(model_dir).has_memory_weights():
                raise TableError(f"{model_dir} has neither a table nor memory tensors to build one from; give --table")
            return None
    found = Manifest.load(path).encoding.name
    if settings.table is None and encoding not in (None, found):
        return None
    return find_table(replace(settings, table=str(path), tol_encoding=encoding or found), model_dir, config)


def _has_weights(model_dir: Path) -> bool:
    return any((model_dir / name).exists() for name in (WEIGHTS, WEIGHTS + ".index.json"))


def _stored(model_dir: Path, dtype: torch.dtype) -> Callable[[str], torch.dtype]:
    """The precision of each tensor of the checkpoint; `dtype` where there is none yet."""
    return Checkpoint(model_dir).dtype if _has_weights(model_dir) else lambda _: dtype
