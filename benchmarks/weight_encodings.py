"""What --weights costs in quality: bits per byte of held-out text, for weights and tables in 16, 8 and 4 bits.

    python benchmarks/weight_encodings.py runs/data/heldout.jsonl.gz --out benchmarks/results/weights-demo-cpu.json

The text is scored by the serving model, with rows gathered from the table's own bytes by the kernels that serve; it is
the middle of each held-out document, the same for all. Attention is dense in float32: keys and values are not rounded.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import machine, write
from table_encodings import Rows, held_out
from tokenizers import Tokenizer
from torch import Tensor

from tolkernels import rms_norm
from tolserve.engine.assemble import use_threads
from tolserve.model.blocks import rotary_tables
from tolserve.model.build import BuildOptions, build_table
from tolserve.model.serving import ServingModel
from tolserve.model.transformer import causal_attention
from tolserve.settings import DEMO_MODEL
from tolserve.tol.table import Table
from tolserve.train.evaluate import HeldOut, batch_values, mean_loss

WEIGHTS = ("auto", "int8", "int4")
TABLES = ("bf16", "int8", "int4")


class Dense:
    """A serving model over whole sequences, as `mean_loss` calls it."""

    def __init__(self, model: ServingModel, rows: Rows) -> None:
        self.model, self.rows = model, rows

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> logits [B, S, V]."""
        config, flat = self.model.config, tokens.flatten()
        heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        causal = causal_attention(*rotary_tables(config, tokens.shape[1], tokens.device))

        def attend(layer: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.view(*tokens.shape, -1, config.head_dim).split(heads, dim=2)
            return causal(layer, q, k, v).flatten(0, 1).flatten(1)

        def add_row(layer: int, stream: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
            stream = self.rows.add(layer, flat, stream)
            return stream, rms_norm(stream, norm, config.rms_norm_eps)

        return self.model.logits(self.model.hidden(flat, attend, add_row)).unflatten(0, tokens.shape)


def measure(model: ServingModel, rows: Rows, text: HeldOut) -> dict[str, Any]:
    loss = mean_loss(Dense(model, rows), text, 1024, batch_values(model.config), torch.device("cpu"))
    return {
        "weights": model.layers[0].qkv.encoding,
        "weight_bytes": model.nbytes,
        "table": rows.manifest.encoding.name,
        "record_bytes": rows.manifest.record_bytes,
        "bits_per_byte": loss.bits_per_byte,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="held-out documents, .jsonl.gz with `text`")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--text-bytes", type=int, default=300_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    text = held_out(args.text, Tokenizer.from_file(str(args.model / "tokenizer.json")), args.text_bytes)
    tables = {}
    for name in TABLES:
        with tempfile.TemporaryDirectory() as folder:
            build_table(args.model, Path(folder) / "tol", BuildOptions(name))
            tables[name] = Rows(Table.open(Path(folder) / "tol"))
    models = [ServingModel.load(args.model, dtype=torch.float32, weights=weights) for weights in WEIGHTS]
    results = [measure(model, rows, text) for model in models for rows in tables.values()]
    plain = results[0]["bits_per_byte"]
    for result in results:
        result["bits_per_byte_against_the_first"] = f"{100 * (result['bits_per_byte'] / plain - 1):+.3f}%"
    write(
        {
            "benchmark": "weights",
            "machine": machine(),
            "model": args.model.name,
            "text_bytes": text.text_bytes,
            "results": results,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
