"""What a start with a table of 12.6 GB costs: opening it, an engine ready to serve, and the memory of both.

    python benchmarks/open_table.py --table /fast/disk/table --model /fast/disk/model --out results/open-table.json

The table holds random records at the paper's 1B shape, the model random weights in bfloat16; both are written once. The
page cache is told to forget the table before each opening (POSIX_FADV_DONTNEED). The engine is assembled as `serve`
does it, in a process of its own; its resident memory is compared with what `tolserve table plan` says.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report
from model_dir import write_model

from tolserve.model.presets import preset
from tolserve.study.random_table import random_table
from tolserve.tol.table import Table

ENGINE = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
from tolserve.engine.assemble import assemble
from tolserve.engine.config import EngineSettings
imported = time.perf_counter()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before, read = resident(), int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
engine = assemble(EngineSettings(**json.loads(sys.argv[1])))
ready = time.perf_counter()
after = resident()
total = int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
engine.pager.preload()
filled = resident()
figures = {"import_seconds": imported - started, "assemble_seconds": ready - imported}
figures |= {"resident_bytes": after - before, "resident_bytes_device_tier_full": filled - before}
print(json.dumps(figures | {"read_bytes": total - read}))
engine.close()
"""


def forget(table: Path) -> None:
    """Drop the table's pages from the page cache."""
    for path in table.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(*command: str) -> Any:
    finished = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return json.loads(finished.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = preset("1B", "memory")
    shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size")}
    random_table(args.table, num_layers=config.num_hidden_layers, **shape)
    write_model(args.model, config, args.table)
    times = []
    for _ in range(9):
        forget(args.table)
        started = time.perf_counter()
        Table.open(args.table)
        times.append(time.perf_counter() - started)
    settings = {"model": str(args.model), "table": str(args.table), "cache_dir": "/nowhere", "dtype": "bfloat16"}
    options = ["--table", str(args.table), "--dtype", "bfloat16", "--json"]
    plan = run("-m", "tolserve", "table", "plan", str(args.model), *options)
    forget(args.table)
    small = run("-c", ENGINE, json.dumps(settings | {"device_cache": "1", "kv_cache": "1GiB"}))
    quarter = run("-c", ENGINE, json.dumps(settings | {"device_cache": "4096", "kv_cache": "1GiB"}))
    result = {
        "table_bytes": sum(path.stat().st_size for path in args.table.iterdir()),
        "open_ms": [round(1000 * seconds, 1) for seconds in times],
        "open_ms_median": round(1000 * statistics.median(times), 1),
        "engine": {"device_cache_1": small, "device_cache_4096": quarter},
        "plan": {key: value for key, value in plan.items() if key in ("memory", "table")},
        "machine": report.machine(),
    }
    report.write(result, args.out)


if __name__ == "__main__":
    main()
