"""Decode speed at a paper shape: memory and flex against base in one engine, paged against fully resident.

    python benchmarks/decode.py --trace trace-llama3.npz --tables /fast/disk/tables --out results/decode.json

Weights are random and next tokens are forced from a trace of real text (tolserve.study.forced). Every step goes through
the whole engine: scheduler, pager, layers, output head, sampler. A paged variant's device cache has a quarter of the
bytes of base's feed-forward weights, whatever the table's encoding; behind it is the disk, or with `--sources host` a
host tier that holds the whole table. `resident` holds all of it in the device tier. Variants take turns round by round,
so that a slow minute of the machine hits them all; ratios are medians of per-round ratios. Needs torch, numpy and
safetensors alone; `--device cuda` runs the same on a GPU. Tables of random records are written once and kept.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from report import machine, write
from sizes import SIZE_NAMES, quarter_of_ffn

from tolserve.engine.assemble import use_threads
from tolserve.model.presets import VARIANTS
from tolserve.study.forced import ForcedEngine, Text, Trace, read_trace
from tolserve.study.random_model import random_model, shape_of
from tolserve.study.random_table import table_of
from tolserve.tol.policy import POLICIES


def make_engines(args: argparse.Namespace) -> dict[str, ForcedEngine]:
    """One per variant, and per encoding and source where there is a table; they share weights where they can."""
    dtype = getattr(torch, args.dtype)
    longest = args.context + (args.steps + 1) * args.rounds + 1
    sizes = {"sequences": max(args.batches), "longest": longest, "dtype": dtype, "policy": args.policy}
    engines, memory = {}, None
    for variant in args.variants:
        config = shape_of(args.size, "memory" if variant == "resident" else variant, args.vocab, args.weights)
        model = memory if variant in ("memory", "resident") and memory is not None else None
        model = model or random_model(config, dtype=dtype, weights=args.weights, device=args.device)
        memory = model if variant in ("memory", "resident") else memory
        if not config.has_memory:
            engines[variant] = ForcedEngine(model, None, **sizes)
            continue
        for encoding in args.encodings:
            table = table_of(args.tables, encoding, config)
            for source in args.sources if variant != "resident" else ["disk"]:
                slots = quarter_of_ffn(shape_of(args.size, "base", args.vocab)) // table.manifest.record_bytes
                everything = table.manifest.vocab_size
                paging = {
                    "slots": everything if variant == "resident" else min(slots, everything),
                    "host_slots": everything if source == "host" else 0,
                }
                name = f"{variant} {encoding}" + (f" {source}" if variant != "resident" else "")
                engines[name] = ForcedEngine(model, table, **paging, **sizes)
    return engines


def measure(engines: dict[str, ForcedEngine], trace: Trace, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    text = Text(trace, batch, args.context)
    for engine in engines.values():
        engine.start(text.prompts)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    before = {name: engine.counters() | {"tokens": engine.generated} for name, engine in engines.items()}
    for _ in range(args.rounds):
        tokens = text.take(1 + args.steps)
        for name, engine in engines.items():
            seconds[name].append(statistics.fmean(engine.timed_steps(tokens)[1:]))
    result = {}
    for name, engine in engines.items():
        after = engine.counters() | {"tokens": engine.generated}
        spent = {key: value - before[name].get(key, 0) for key, value in after.items()}
        result[name] = figures(seconds[name], spent, args.rounds * (args.steps + 1))
        for other in ("base", f"resident {name.split()[1]}" if " " in name else ""):
            if other in engines:
                result[name][f"time_over_{other.split()[0]}"] = round(ratio(seconds[name], seconds[other]), 3)
        engine.stop()
    return result


def figures(times: list[float], spent: dict[str, float], steps: int) -> dict[str, Any]:
    """What the rounds took, and what all their steps spent."""
    result: dict[str, Any] = {
        "ms_per_step_by_round": [round(1000 * t, 2) for t in times],
        "ms_per_step": round(1000 * statistics.median(times), 2),
        "tokens_per_second": round(spent["tokens"] / steps / statistics.median(times), 2),  # fewer where one sits out
    }
    if lookups := spent.get("tol_lookups_total"):
        stall = spent["tol_stall_seconds_total"]
        result |= {
            "hit_rate": round(spent["tol_hits_total"] / lookups, 4),
            "stall_ms_per_step": round(1000 * stall / steps, 3),
            "stall_share": round(stall / steps / statistics.fmean(times), 4),
            "read_bytes_per_step": round(spent["tol_read_bytes_total"] / steps),
        }
    return result


def ratio(times: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument(
        "--tables", type=Path, required=True, help="folder of random tables, one an encoding, written if absent"
    )
    parser.add_argument("--size", default="1B", choices=SIZE_NAMES)
    parser.add_argument("--vocab", type=int, help="fold token ids onto fewer (a smaller table and head)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--weights", default="auto", choices=("auto", "int8", "int4"))
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=(*VARIANTS, "resident"),
        help="resident needs memory for the whole table",
    )
    parser.add_argument("--encodings", nargs="+", default=["bf16"], choices=("bf16", "int8", "int4"))
    parser.add_argument("--sources", nargs="+", default=["disk"], choices=("disk", "host"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="timed, per variant and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-lookups", type=int, default=30_000)
    parser.add_argument("--policy", default="context", choices=POLICIES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    engines = make_engines(args)
    trace = read_trace(args.trace, shape_of(args.size, "memory", args.vocab).vocab_size)
    half = len(trace) // 2
    for engine in engines.values():
        engine.warm(trace[:half], args.warm_lookups)
    report = machine(args.device) | {
        "memory": {name: engine.bytes() for name, engine in engines.items()},
        "batches": {str(batch): measure(engines, trace[half:], batch, args) for batch in args.batches},
    }
    if args.device == "cuda":
        report["peak_bytes"] = torch.cuda.max_memory_allocated()  # of all variants that ran
    write(report, args.out)


if __name__ == "__main__":
    main()
