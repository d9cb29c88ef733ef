"""Tabulation: run every memory FFN once over the vocabulary and write the results as a table (paper eq. 2.9)."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tolserve.model.checkpoint import (
    FINGERPRINT_KEY,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    is_memory_tensor,
    load_transformer,
    read_fingerprint,
    save_checkpoint,
    save_tensors,
)
from tolserve.model.config import ModelConfig
from tolserve.model.transformer import Transformer
from tolserve.tol.table import Manifest, TableError
from tolserve.tol.writer import TableWriter

# Tokens per FFN call: large enough that the weights are read from memory rarely, small enough that the widest
# intermediate (K floats per token) stays at a few tens of megabytes.
TOKENS_PER_BATCH = 1024

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


def _quiet(done: int, total: int) -> None:
    pass


@torch.inference_mode()
def compute_records(model: Transformer) -> Iterator[npt.NDArray[np.uint8]]:
    """Records of all tokens in order, [n, record_bytes] per batch.

    FFNs run in float32 whatever the checkpoint's precision; each row is rounded once, to bf16.
    """
    for start in range(0, model.config.vocab_size, TOKENS_PER_BATCH):
        embedding = model.model.embed_tokens.weight[start : start + TOKENS_PER_BATCH]
        rows = [layer.memory_row(embedding) for layer in model.model.layers]
        records = torch.stack(rows, dim=1).to(torch.bfloat16).flatten(1)  # [n, layers * d]
        yield records.view(torch.uint8).numpy()


def build_table(model_dir: Path, out: Path, *, force: bool = False, progress: Progress = _quiet) -> Manifest:
    """Tabulate a model with memory tensors into the folder `out`, which appears only when complete.

    Raises CheckpointError for a model without memory tensors, TableError when `out` exists and `force` is not given.
    """
    config = ModelConfig.load(model_dir)
    if not config.has_memory:
        raise CheckpointError(f"{model_dir} is a base model: its FFNs read the residual stream and have no table")
    if not Checkpoint(model_dir).has_memory_weights():
        raise CheckpointError(f"{model_dir} has no memory tensors to build a table from")
    if out.exists() and not force:
        raise TableError(f"{out} exists; give --force to replace it once the new table is complete")
    fingerprint = read_fingerprint(model_dir)
    model = load_transformer(model_dir, with_memory=True, dtype=torch.float32)
    writer = TableWriter(
        out,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        fingerprint=fingerprint,
    )
    done = 0
    try:
        for records in compute_records(model):
            writer.write(records)
            done += len(records)
            progress(done, config.vocab_size)
        return writer.finish()
    except BaseException:
        writer.abort()
        raise


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
    """Write a serving model directory: the checkpoint without its memory tensors, and its table under `out`/tol."""
    config = ModelConfig.load(model_dir)
    if out.exists() and any(out.iterdir()):
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
