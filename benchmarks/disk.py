"""Random record reads through the disk tier beside fio, and what a batch of misses waits.

    python benchmarks/disk.py --table /fast/disk/table --out benchmarks/results/disk-cpu.json

Throughput: whole records, random over the table, with 1, 8 and 32 reads at the disk, through DiskSource with checksums
and a copy to where the record belongs; and fio on the same files, blocks and depth, with the engine that does the same
system calls. The two take turns, round by round; ratios are per round. Batches: from `submit` until the last of k
records is delivered, through each way of reading. O_DIRECT all along. Needs fio, and a table larger than a disk's own
cache (4 GB is written unless a table is there).
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import report

from tolserve.study.random_table import random_table
from tolserve.tol import table as tables
from tolserve.tol.disk import DiskSource, Read, ReadRequest
from tolserve.tol.table import Bytes, Table

# Where records are delivered to, one after another: more than a processor's cache holds.
DESTINATION_BYTES = 64 << 20


def requests(table: Table, seed: int, background: bool = False) -> Iterator[ReadRequest]:
    """Random whole records without end."""
    rng = np.random.default_rng(seed)
    size = table.manifest.record_bytes
    slots = np.ones((DESTINATION_BYTES // size, size), np.uint8)  # ones, so that its pages are there already
    groups = range(len(table.manifest.groups))
    slot = 0
    for _ in repeat(None):
        for token in rng.integers(0, table.manifest.vocab_size, 4096).tolist():
            slot = (slot + 1) % len(slots)

            def deliver(payload: Bytes, slot: int = slot) -> None:
                slots[slot] = payload

            yield ReadRequest(token, groups, deliver, background)


def checked(reads: list[Read]) -> list[Read]:
    for read in reads:
        if read.error or read.fault:
            raise SystemExit(f"{read.error or read.fault}")
    return reads


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{share}_us": round(float(np.percentile(seconds, share)) * 1e6) for share in (50, 99)}


def ours(table: Table, depth: int, seconds: float, seed: int) -> dict[str, Any]:
    """Keep `depth` reads at the disk and as many waiting."""
    source = DiskSource(table, depth=depth)
    coming = requests(table, seed)
    source.submit([next(coming) for _ in range(2 * depth)])
    latencies: list[float] = []
    started, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        reads = checked(source.finished(block=True))
        source.submit([next(coming) for _ in reads])
        latencies += [read.seconds for read in reads]
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    source.close()
    return {
        "gb_per_s": round(len(latencies) * table.manifest.record_bytes / elapsed / 1e9, 3),
        **percentiles(latencies),
        "cpu_us_per_read": round(cpu / len(latencies) * 1e6, 1),
    }


def fio(table: Table, depth: int, seconds: float, asynchronous: bool) -> dict[str, Any]:
    shards = table.manifest.shards
    engine = ["--ioengine=libaio", f"--iodepth={depth}"] if asynchronous else ["--ioengine=psync", f"--numjobs={depth}"]
    options = {
        "name": "records",
        "filename": ":".join(str(table.path / shard.file) for shard in shards),
        "offset": shards[0].data_start,
        "bs": table.manifest.record_stride,
        "rw": "randread",
        "direct": 1,
        "runtime": seconds,
        "output-format": "json",
    }
    flags = ["--time_based", "--norandommap", "--randrepeat=0", "--readonly", "--group_reporting", "--thread"]
    flags += ["--lat_percentiles=1", "--clat_percentiles=0"]
    command = ["fio", *engine, *flags, *(f"--{name}={value}" for name, value in options.items())]
    job = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)["jobs"][0]
    read, spent = job["read"], job["usr_cpu"] + job["sys_cpu"]
    return {
        "gb_per_s": round(read["bw_bytes"] / 1e9, 3),
        **{f"p{share}_us": round(read["lat_ns"]["percentile"][f"{share}.000000"] / 1000) for share in (50, 99)},
        "cpu_us_per_read": round(spent / 100 * read["runtime"] / read["total_ios"] * 1000, 1),
    }


def throughput(table: Table, depth: int, args: argparse.Namespace, asynchronous: bool) -> dict[str, Any]:
    rounds = []
    for number in range(args.rounds):
        turns = {
            "ours": lambda seed=number: ours(table, depth, args.seconds, seed),
            "fio": lambda: fio(table, depth, args.seconds, asynchronous),
        }
        order = list(turns) if number % 2 else list(reversed(turns))
        row = {name: turns[name]() for name in order}
        row["ratio"] = round(row["ours"]["gb_per_s"] / row["fio"]["gb_per_s"], 3)
        print(f"depth {depth}: {row}", flush=True)
        rounds.append(row)
    return {"ratio": statistics.median(row["ratio"] for row in rounds), "rounds": rounds}


def batches(table: Table, sizes: list[int], count: int) -> dict[str, Any]:
    """By way of reading and size of the batch; ways and sizes take turns."""
    source = DiskSource(table)
    ways = {"asynchronous": False, "threads": True} if source.asynchronous else {"threads": True}
    coming = {name: requests(table, 7, background) for name, background in ways.items()}
    waits: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in ways}
    for _ in range(count):
        for size in sizes:
            for name in ways:
                batch = [next(coming[name]) for _ in range(size)]
                started, left = time.perf_counter(), size
                source.submit(batch)
                while left:
                    left -= len(checked(source.finished(block=True)))
                waits[name][size].append(time.perf_counter() - started)
    source.close()
    return {name: {str(size): percentiles(values) for size, values in by.items()} for name, by in waits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="folder of the random table, written if absent")
    parser.add_argument("--vocab-size", type=int, default=43_690)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    parser.add_argument("--batch-count", type=int, default=400, help="batches of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="per side, depth and round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape = {"vocab_size": args.vocab_size, "num_layers": args.num_layers, "hidden_size": args.hidden_size}
    table = random_table(args.table, **shape)
    source = DiskSource(table)
    if source.io != "direct":
        raise SystemExit(f"{args.table} lies where direct reads are refused; name another folder")
    facts = report.machine() | {
        "record_bytes": table.manifest.record_bytes,
        "record_stride": table.manifest.record_stride,
        "table_bytes": table.manifest.record_stride * table.manifest.vocab_size,
        "reads": source.describe(),
        "cached_share_before": source.cached_share(),
        "checksums": tables.crc32.__module__,
        "load_before": os.getloadavg(),
    }
    asynchronous = source.asynchronous
    source.close()
    depths = {str(depth): throughput(table, depth, args, asynchronous) for depth in args.depths}
    waits = batches(table, args.batches, args.batch_count)
    after = {"cached_share_after": DiskSource(table).cached_share(), "load_after": os.getloadavg()}
    report.write(facts | after | {"throughput": depths, "batch_waits": waits}, args.out)


if __name__ == "__main__":
    main()
