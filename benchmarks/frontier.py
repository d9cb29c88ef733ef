"""Tokens per second against resident bytes: memory models at several sizes of everything, and dense models quantised.

    python benchmarks/frontier.py --trace trace-llama3.npz --tables /fast/disk/tables --files /fast/disk/gguf \\
        --llama-python L/bin/python --out results/frontier.json
    python benchmarks/frontier_plot.py results/frontier.json docs/images/frontier.svg

A point is a model's weights in 16 bits, int8 or int4; for `memory` also a table's encoding and a device cache (shares
of the bytes of base's 16-bit feed-forward weights), with the disk behind it. The dense ones are `base` in our engine
and llama.cpp's Q8_0 and Q4_K. Resident bytes are weights, keys and values, device cache and factors; the process's own
RAM stands beside them. Points take turns as in peers.py: one process for each set of weights, the others stopped.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from peer import PeerProcess
from peers import add_common_options, checked, llama_cpp, ours, tell_ready
from report import machine, write
from sizes import quarter_of_ffn

from tolserve.study.forced import Text, Trace, read_trace
from tolserve.study.random_table import table_of

WEIGHTS = {"auto": "16-bit", "int8": "int8", "int4": "int4"}
COUNTED = ("tol_lookups_total", "tol_hits_total", "tol_stall_seconds_total")


@dataclass
class Point:
    """One configuration: which process runs it, and what that must be told before it does."""

    peer: PeerProcess
    model: str
    weights: str
    table: str | None = None
    cache_share: float | None = None
    use: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def turn(self, text: Text, steps: int) -> None:
        """Run prompts, then one untimed and `steps` timed steps in the cache's steady state."""
        if self.use:
            self.peer.ask("use", **self.use)
        self.peer.ask("start", prompts=text.prompts)
        tokens = text.take(1 + steps)
        before = self.peer.ask("facts").get("counters", {})
        self.seconds.append(statistics.fmean(self.peer.ask("steps", tokens=tokens)["seconds"][1:]))
        self.facts = self.peer.ask("facts")
        after = self.facts.pop("counters", {})
        for name in COUNTED if self.table else ():
            self.spent[name] = self.spent.get(name, 0) + after[name] - before.get(name, 0)

    def result(self, batch: int, context: int) -> dict[str, Any]:
        """Figures of the rounds so far, which are then forgotten."""
        held, seconds = self.facts["bytes"], statistics.median(self.seconds)
        figures: dict[str, Any] = {
            "model": self.model,
            "weights": self.weights,
            "table": self.table,
            "cache_share": self.cache_share,
            "batch": batch,
            "ms_per_step": round(1000 * seconds, 2),
            "ms_by_round": [round(1000 * value, 2) for value in self.seconds],
            "tokens_per_second": round(batch / seconds, 2),
            "resident_bytes": sum(held.values()) + held["kv_per_token"] * (batch * context - 1),
            "bytes": held,
            "process": self.facts["process"],
        }
        if lookups := self.spent.get("tol_lookups_total"):
            figures["hit_rate"] = round(self.spent["tol_hits_total"] / lookups, 4)
            stall = self.spent["tol_stall_seconds_total"] / len(self.seconds)
            figures["stall_ms_per_round"] = round(1000 * stall, 2)
        self.seconds, self.spent = [], {}
        return figures


def make_points(args: argparse.Namespace, stack: ExitStack) -> list[Point]:
    """Start all processes, one after the other, and say which points each of them runs."""
    points: list[Point] = []

    def started(peer: PeerProcess) -> PeerProcess:
        stack.callback(peer.close)
        tell_ready(peer)
        return peer

    for weights, name in WEIGHTS.items():
        peer = started(ours(args, f"memory {name}", args.config("memory"), weights))
        for encoding in args.encodings:
            table = str((args.tables / encoding).absolute())
            for share in args.cache_shares:
                use = {"table": table, "cache_bytes": int(4 * share * quarter_of_ffn(args.config("base")))}
                points.append(Point(peer, "memory", name, encoding, share, use))
    for weights, name in WEIGHTS.items():
        peer = started(ours(args, f"base {name}", args.config("base", weights), weights))
        points.append(Point(peer, "base", name))
    for kind in ("Q8_0", "Q4_K") if args.llama_python else ():
        points.append(Point(started(llama_cpp(args, kind)), "llama.cpp", kind))
    return points


def measure(points: list[Point], trace: Trace, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    for number in range(args.rounds):
        for point in points:
            point.turn(Text(trace, batch, args.context, part=number), args.steps)
        print(f"batch {batch}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return [point.result(batch, args.context) for point in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--encodings", nargs="+", default=["bf16", "int8", "int4"], choices=("bf16", "int8", "int4"))
    parser.add_argument("--cache-shares", type=float, nargs="+", default=[1 / 16, 1 / 4])
    parser.set_defaults(rounds=2, warm_lookups=5_000)
    args = checked(parser)
    config = args.config("memory")
    args.shapes = [(batch, args.context) for batch in args.batches]
    args.room = args.steps + 2
    for encoding in args.encodings:
        table_of(args.tables, encoding, config)
    trace = read_trace(args.trace, config.vocab_size)
    with ExitStack() as stack:
        points = make_points(args, stack)
        report = machine(args.device) | {"points": []}
        for batch in args.batches:
            report["points"] += measure(points, trace[len(trace) // 2 :], batch, args)
            write(report, args.out)


if __name__ == "__main__":
    main()
