"""What each encoding costs and loses on a model: bytes, bits per byte of held-out text, largest row error.

    python benchmarks/table_encodings.py runs/data/heldout.jsonl.gz --out benchmarks/results/encodings-demo-cpu.json

Every table is built as `tolserve table build` does, and the text is scored with rows gathered from the table's own
bytes by the kernels that serve. The text is the middle of each held-out document, the same for all encodings. Row
errors are against the networks in float64, over the whole vocabulary.
"""

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from report import machine, write
from tokenizers import Tokenizer
from torch import Tensor

from tolkernels import add_rows
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.checkpoint import load_transformer
from tolserve.model.transformer import Transformer
from tolserve.settings import DEMO_MODEL
from tolserve.tol.table import Table, describe
from tolserve.train.evaluate import HeldOut, evaluate

VARIANTS = {
    "bf16": BuildOptions(),
    "int8": BuildOptions("int8"),
    "int4": BuildOptions("int4"),
    "int4, groups of 32": BuildOptions("int4", group_size=32),
    "lowrank 64": BuildOptions(rank=64),
    "lowrank 128": BuildOptions(rank=128),
    "lowrank 192": BuildOptions(rank=192),
    "lowrank energy 0.99": BuildOptions(energy=0.99),
    "lowrank-int8 128": BuildOptions("int8", rank=128),
    "lowrank-int8 energy 0.99": BuildOptions("int8", energy=0.99),
    "lowrank-int4 192": BuildOptions("int4", rank=192),
}


def held_out(path: Path, tokenizer: Tokenizer, text_bytes: int) -> HeldOut:
    """An equal number of characters from the middle of each document, about `text_bytes` in all."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    share = text_bytes // len(texts)
    parts = [text[len(text) // 2 :][:share] for text in texts]
    documents = tuple(np.array([0, *tokenizer.encode(part, add_special_tokens=False).ids]) for part in parts)
    return HeldOut(documents, sum(len(part.encode()) for part in parts))


class Rows:
    """A table's rows as serving adds them: all records in an arena, gathered by the kernels."""

    def __init__(self, table: Table) -> None:
        self.manifest = table.manifest
        self.data = torch.from_numpy(np.stack([table.read_record(t) for t in range(self.manifest.vocab_size)]))
        factors = table.read_factors().items()
        self.factors = {layer: torch.from_numpy(bits).view(torch.bfloat16).float() for layer, bits in factors}

    def add(self, layer: int, tokens: Tensor, x: Tensor) -> Tensor:
        """x [T, d] plus the layer's rows of tokens [T]."""
        group, row = self.manifest.row_layout(layer)
        offset = self.manifest.groups[group].offset + row.offset
        how = {"offset": offset, "values": row.values, "group_size": row.group_size}
        ones = torch.ones(x.shape[1])  # the norm that comes with it is not asked for
        return add_rows(self.data, tokens, x, ones, 1e-5, **how, factor=self.factors.get(layer))[0]

    def live_rows(self, tokens: Tensor, alpha: float = 1.0) -> Callable[[int, Tensor], Tensor]:
        """In place of Transformer.live_rows."""
        return lambda layer, x: self.add(layer, tokens.flatten(), x.flatten(0, 1)).view(x.shape)


@torch.inference_mode()
def exact_rows(model: Transformer) -> list[Tensor]:
    """Each layer's rows [vocab_size, d] in float64."""
    embedding, rows = model.model.embed_tokens.weight.double(), []
    for layer in model.model.layers:
        norm = layer.memory_layernorm
        rows.append(layer.memory.double()(F.rms_norm(embedding, norm.weight.shape, norm.weight.double(), norm.eps)))
        layer.memory.float()
    return rows


@torch.inference_mode()
def row_errors(rows: Rows, exact: list[Tensor]) -> dict[str, float]:
    """Largest over all tokens and layers; `relative` is a row's largest error over the row's largest value."""
    tokens = torch.arange(rows.manifest.vocab_size)
    absolute, relative = 0.0, 0.0
    for layer, expected in enumerate(exact):
        found = rows.add(layer, tokens, torch.zeros_like(expected, dtype=torch.float32))
        errors = (found.double() - expected).abs().amax(1)
        absolute = max(absolute, float(errors.max()))
        relative = max(relative, float((errors / expected.abs().amax(1)).max()))
    return {"absolute": absolute, "relative": relative}


def measure(name: str, model: Transformer, model_dir: Path, text: HeldOut, exact: list[Tensor]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        build_table(model_dir, Path(folder) / "tol", VARIANTS[name])
        seconds = time.perf_counter() - started
        table = Table.open(Path(folder) / "tol")
        facts, rows = describe(table), Rows(table)
    model.live_rows = rows.live_rows  # type: ignore[method-assign]
    factors = sum(factor.numel() * 2 for factor in rows.factors.values())
    return {
        "variant": name,
        "encoding": facts["encoding"],
        "record_bytes": facts["record_bytes"],
        "record_stride": facts["record_stride"],
        "read_bytes_per_token": facts["read_bytes"],
        "table_bytes": facts["file_bytes"],
        "factor_bytes": factors,
        "bits_per_byte": evaluate(model, text, 1024).bits_per_byte,
        "largest_row_error": row_errors(rows, exact),
        "build_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="held-out documents, .jsonl.gz with `text`")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text-bytes", type=int, default=300_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = load_transformer(args.model, with_memory=True, dtype=torch.float32)
    text = held_out(args.text, Tokenizer.from_file(str(args.model / "tokenizer.json")), args.text_bytes)
    exact = exact_rows(model)
    results = [measure(name, model, args.model, text, exact) for name in VARIANTS]
    plain = results[0]["bits_per_byte"]
    for result in results:
        result["bits_per_byte_against_bf16"] = f"{100 * (result['bits_per_byte'] / plain - 1):+.3f}%"
    report = {
        "benchmark": "encodings",
        "machine": machine(),
        "model": args.model.name,
        "text": {"bytes": text.text_bytes, "tokens": sum(map(len, text.documents)), "documents": len(text.documents)},
        "options": {name: asdict(options) for name, options in VARIANTS.items()},
        "results": results,
    }
    write(report, args.out)


if __name__ == "__main__":
    main()
