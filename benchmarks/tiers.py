"""Should the host tier keep what the device tier holds (inclusive), or only what that evicted (exclusive)?

    python benchmarks/tiers.py --trace trace-llama3.npz --out benchmarks/results/tiers-llama3.json

The device tier replays the trace's odd documents as `tolserve table replay` does. Its misses and victims then go
through three host tiers of the same size, all least recently used:

- inclusive: keeps every record read from disk, and is touched when the device tier misses;
- touched: the same, and touched when the device tier evicts a record that is here as well;
- exclusive: takes each record that the device tier evicts; one that goes up leaves it.

What counts is the share of the device tier's lookups that go to disk, second half of the steps. An exclusive tier
copies every victim down from the device, which the others never do: `down_bytes_per_step`.
"""

import argparse
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import report

from tolserve.tol.policy import POLICIES, make_policy
from tolserve.tol.replay import Steps, Trace, interleave

# A quarter of the FFNs' bytes at the 1B shape, 402,653,184 bytes, holds so many records; scales are left out.
QUARTER_BYTES = 402_653_184
DEVICE = {"bf16": 4096, "int8": 8192, "int4": 16384}
HOST_SHARES = (0.05, 0.10, 0.20)

Miss = tuple[int, int | None]  # the token, and the victim that made room for it


def misses(steps: Steps, slots: int, policy_name: str) -> Iterator[list[Miss]]:
    """Of each step, as a replay calls a policy."""
    policy = make_policy(policy_name, slots)
    resident: set[int] = set()
    for step, wanted in enumerate(steps.distinct):
        for at in range(steps.bounds[step], steps.bounds[step + 1]):
            policy.advance(steps.documents[at], (steps.tokens[at],))
        missing = [token for token in wanted if token not in resident]
        for token in wanted:
            if token in resident:
                policy.touch(token)
        in_use = set(wanted)
        made: list[Miss] = []
        for token in missing:
            victim = policy.victim(lambda key, in_use=in_use: key not in in_use) if len(resident) == slots else None
            if victim is not None:
                policy.remove(victim)
                resident.remove(victim)
            policy.insert(token)
            policy.touch(token)
            resident.add(token)
            made.append((token, victim))
        for document in steps.ends.get(step, ()):
            policy.end(document)
        yield made


class Inclusive:
    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.order: OrderedDict[int, None] = OrderedDict()

    def serve(self, token: int, victim: int | None) -> bool:
        """Whether the record was here."""
        found = token in self.order
        self.order[token] = None
        self.order.move_to_end(token)
        if len(self.order) > self.slots:
            self.order.popitem(last=False)
        return found


class Touched(Inclusive):
    def serve(self, token: int, victim: int | None) -> bool:
        if victim in self.order:
            self.order.move_to_end(victim)
        return super().serve(token, None)


class Exclusive(Inclusive):
    def serve(self, token: int, victim: int | None) -> bool:
        found = token in self.order
        if found:
            del self.order[token]
        if victim is not None:
            super().serve(victim, None)
        return found


def measure(path: Path, sequences: int, encoding: str, policy: str) -> list[dict[str, Any]]:
    """One row per size of the host tier."""
    trace = Trace.load(path)
    steps = interleave(trace.documents(range(1, len(trace.offsets) - 1, 2)), sequences)
    slots = DEVICE[encoding]
    sizes = [int(share * trace.vocab_size) for share in HOST_SHARES]
    tiers = [(Inclusive(size), Touched(size), Exclusive(size)) for size in sizes]
    disk = [[0, 0, 0] for _ in sizes]
    missed = evicted = 0
    for step, made in enumerate(misses(steps, slots, policy)):
        measured = step >= steps.warmup
        for token, victim in made:
            for pair, counts in zip(tiers, disk, strict=True):
                for kind, tier in enumerate(pair):
                    counts[kind] += not tier.serve(token, victim) and measured
        if measured:
            missed += len(made)
            evicted += sum(victim is not None for _, victim in made)
    lookups = sum(map(len, steps.distinct[steps.warmup :]))
    measured_steps = len(steps) - steps.warmup
    rows = []
    for share, size, (inclusive, touched, exclusive) in zip(HOST_SHARES, sizes, disk, strict=True):
        record_bytes = QUARTER_BYTES // slots
        rows.append(
            {
                "sequences": sequences,
                "policy": policy,
                "device": f"{encoding}, {slots} records, {slots / trace.vocab_size:.1%}",
                "host": f"{share:.0%}",
                "host_slots": size,
                "host_bytes": size * record_bytes,
                "device_miss_share": round(missed / lookups, 5),
                "disk_share": {
                    "inclusive": round(inclusive / lookups, 5),
                    "touched": round(touched / lookups, 5),
                    "exclusive": round(exclusive / lookups, 5),
                },
                "disk_reads_exclusive_over_inclusive": round(exclusive / max(inclusive, 1), 3),
                "down_bytes_per_step": round(evicted / measured_steps * record_bytes),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--policies", nargs="+", default=["lru", "context"], choices=POLICIES, help="device tier's")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with ProcessPoolExecutor(args.processes) as pool:
        runs = [
            pool.submit(measure, args.trace, sequences, encoding, policy)
            for sequences in args.sequences
            for encoding in DEVICE
            for policy in args.policies
        ]
        rows = [row for run in runs for row in run.result()]
    report.write({"documents": "odd", "rows": rows, "machine": report.machine()}, args.out)


if __name__ == "__main__":
    main()
