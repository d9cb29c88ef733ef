"""A table of random records at any shape, for the benchmarks.

    python benchmarks/random_table.py /fast/disk/table --vocab-size 128256 --num-layers 24 --hidden-size 2048

A table that is there already is opened, not written again.
"""

import argparse
import time
from pathlib import Path
from typing import get_args

import report

from tolserve.study.random_table import random_table
from tolserve.tol.encoding import GROUP_SIZE, Encoding, Values
from tolserve.tol.table import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--encoding", default="bf16", choices=get_args(Values))
    parser.add_argument("--group-size", type=int, default=GROUP_SIZE, help="values per scale, of int8 and int4")
    args = vars(parser.parse_args())
    started = time.perf_counter()
    values, group_size = args.pop("encoding"), args.pop("group_size")
    encoding = Encoding(values, None if values == "bf16" else group_size)
    facts = describe(random_table(**args, encoding=encoding))
    report.write(facts | {"seconds": round(time.perf_counter() - started, 1)}, None)


if __name__ == "__main__":
    main()
