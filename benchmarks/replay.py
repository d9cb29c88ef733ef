"""Hit rates of every replacement policy beside the optimum, and what a step costs, on documents it was not tuned on.

    python benchmarks/replay.py --trace trace-llama3.npz --out benchmarks/results/replay-llama3.json

`context` was tuned on the even documents; the odd ones are replayed. The first half of the steps warms up, the second
is measured. Policies that pin take the tokens' counts in the first half. The cost is the processor time of a policy's
whole replay, the bookkeeping of the replay included, divided by its steps; each number of sequences runs in a process
of its own.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import report

from tolserve.tol.frequencies import most_frequent
from tolserve.tol.policy import POLICIES, make_policy
from tolserve.tol.replay import Trace, hit_rate, interleave, oracle_hit_rate
from tolserve.tol.size import parse_cache_size

SHARES = ("1%", "5%", "10%", "20%")


def measure(path: Path, first: int, sequences: int) -> list[dict[str, Any]]:
    """One row per cache size."""
    trace = Trace.load(path)
    steps = interleave(trace.documents(range(first, len(trace.offsets) - 1, 2)), sequences)
    frequent = most_frequent(steps.counts())
    rows = []
    for share in SHARES:
        slots = parse_cache_size(share, 1, trace.vocab_size)
        row: dict[str, Any] = {"sequences": sequences, "cache": share, "slots": slots, "steps": len(steps)}
        row["hit_rate"] = {"optimum": round(oracle_hit_rate(steps, slots), 5)}
        row["ms_per_step"] = {}
        for name in POLICIES:
            started = time.process_time()
            row["hit_rate"][name] = round(hit_rate(steps, slots, make_policy(name, slots, frequent)), 5)
            row["ms_per_step"][name] = round((time.process_time() - started) / len(steps) * 1000, 4)
        lru, best = row["hit_rate"]["lru"], row["hit_rate"]["optimum"]
        row["gap_closed"] = {name: round((row["hit_rate"][name] - lru) / (best - lru), 3) for name in POLICIES}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--documents", choices=["even", "odd"], default="odd")
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    first = ("even", "odd").index(args.documents)
    with ProcessPoolExecutor(len(args.sequences)) as pool:
        runs = [pool.submit(measure, args.trace, first, sequences) for sequences in args.sequences]
        rows = [row for run in runs for row in run.result()]
    report.write({"documents": args.documents, "rows": rows, "machine": report.machine()}, args.out)


if __name__ == "__main__":
    main()
