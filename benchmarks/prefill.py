"""Time to the first token at a paper shape: the prompt's records not in the device cache, and again when they are.

    python benchmarks/prefill.py --trace trace-llama3.npz --tables /fast/disk/tables --out results/prefill.json

Cold: the device cache, a quarter of the bytes of base's feed-forward weights, is full of records that the prompt does
not use. Warm: the same prompt once more; keys and values are computed again. Prompts are passages of real text over
random weights (tolserve.study.forced). Stall is what the forward pass waited for rows. `base` runs the same prompts
with its feed-forward networks, and has no table. Variants take turns round by round; direct I/O leaves the page cache
out.
"""

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import machine, write
from sizes import SIZE_NAMES, quarter_of_ffn

from tolserve.engine.assemble import use_threads
from tolserve.study.forced import ForcedEngine, Text, Trace, read_trace
from tolserve.study.random_model import random_model, shape_of
from tolserve.study.random_table import table_of

COUNTED = {"stall_ms": "tol_stall_seconds_total", "read_ms": "tol_fill_seconds", "reads": "tol_fills_total"}


def make_engines(args: argparse.Namespace) -> dict[str, ForcedEngine]:
    """By name: one for each chunk size, encoding and source, and one of `base` for each chunk size."""
    dtype = getattr(torch, args.dtype)
    shapes = {variant: shape_of(args.size, variant, args.vocab, args.weights) for variant in ("base", "memory")}
    models = {
        name: random_model(shapes[name], dtype=dtype, weights=args.weights, device=args.device)
        for name in (("memory",) if args.no_base else ("base", "memory"))
    }
    engines = {}
    for chunk in args.chunks:
        options = {"sequences": 1, "longest": max(args.prompts) + 1, "dtype": dtype, "chunk": chunk}
        if "base" in models:
            engines[f"base, chunks of {chunk}"] = ForcedEngine(models["base"], None, **options)
        for encoding in args.encodings:
            table = table_of(args.tables, encoding, shapes["memory"])
            slots = min(quarter_of_ffn(shapes["base"]) // table.manifest.record_bytes, table.manifest.vocab_size)
            for source in args.sources:
                host = table.manifest.vocab_size if source == "host" else 0
                engine = ForcedEngine(models["memory"], table, slots=slots, host_slots=host, **options)
                engines[f"memory {encoding} {source}, chunks of {chunk}"] = engine
    return engines


def fill_with_others(engine: ForcedEngine, prompt: list[int], trace: Trace) -> None:
    """Leave no record of the prompt in the device tier, and no free slot either."""
    pager = engine.engine.pager
    if pager is None:
        return
    slots = pager.slots
    engine.engine.resize("1", None)  # forgets all records but one
    engine.engine.resize(str(slots), None)
    others = np.setdiff1d(trace[: 64 * slots], prompt)
    pager.preload(others[:slots].tolist())


def run(engine: ForcedEngine, prompts: list[list[int]]) -> dict[str, float]:
    """Milliseconds to the first token, and what was read and waited for until then."""
    before = engine.counters()
    started = time.perf_counter()
    engine.start(prompts)
    spent = {"first_token_ms": 1000 * (time.perf_counter() - started)}
    engine.stop()
    after = engine.counters()
    for name, counter in COUNTED.items():
        if counter in after:
            spent[name] = (after[counter] - before[counter]) * (1000 if name.endswith("ms") else 1)
    return spent


def measure(engines: dict[str, ForcedEngine], trace: Trace, length: int, rounds: int) -> dict[str, Any]:
    """The first round only wakes the machine."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds + 1):
        prompts = Text(trace, 1, length, part=number).prompts
        for name, engine in engines.items():
            fill_with_others(engine, prompts[0], trace)
            for kind in ("cold", "warm") if engine.engine.pager is not None else ("warm",):
                spent = run(engine, prompts)
                if number:
                    runs[name][kind].append(spent)
    return {name: figures(kinds) for name, kinds in runs.items()}


def figures(kinds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind, runs in kinds.items():
        result[kind] = {name: round(statistics.median(run[name] for run in runs), 1) for name in runs[0]}
        result[kind]["first_token_ms_by_round"] = [round(run["first_token_ms"], 1) for run in runs]
        if "stall_ms" in runs[0]:
            shares = [run["stall_ms"] / run["first_token_ms"] for run in runs]
            result[kind]["stall_share"] = round(statistics.median(shares), 4)
    if "cold" in kinds:
        ratios = [
            cold["first_token_ms"] / warm["first_token_ms"]
            for cold, warm in zip(kinds["cold"], kinds["warm"], strict=True)
        ]
        result["cold_over_warm"] = round(statistics.median(ratios), 3)
    return result


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
    parser.add_argument("--encodings", nargs="+", default=["bf16"], choices=("bf16", "int8", "int4"))
    parser.add_argument("--sources", nargs="+", default=["disk"], choices=("disk", "host"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2000], help="lengths in tokens")
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 128], help="--max-num-batched-tokens")
    parser.add_argument("--no-base", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_threads()
    engines = make_engines(args)
    trace = read_trace(args.trace, shape_of(args.size, "memory", args.vocab).vocab_size)
    report = machine(args.device) | {
        "memory": {name: engine.bytes() for name, engine in engines.items()},
        "prompts": {str(length): measure(engines, trace, length, args.rounds) for length in args.prompts},
    }
    write(report, args.out)


if __name__ == "__main__":
    main()
