"""How fast a CPU attends and adds rows between the linear maps: the compiled kernels beside their torch twins.

    python benchmarks/attention.py --out benchmarks/results/attention-cpu.json

Ours, the twin and (for decoding) a plain read of as many bytes run in turns, over keys and values that no cache holds.
`us` is the median, `over_twin` the median of how many times as fast as the twin, `share_of_read` that of the plain
read's time over ours: 1.0 is the memory's bandwidth. With one thread times are the thread's processor time, which other
programs on the machine disturb less.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from report import machine, write
from torch import Tensor

import tolkernels
from tolkernels import attention, gather

BLOCK = 16
LAYERS = 24
# (query heads, kv heads, values a head): the 1B shape, and one with grouped queries
HEADS = {"1B": (32, 32, 64), "grouped": (32, 8, 128)}
DECODES = [
    (heads, dtype, batch, context)
    for heads, dtype in (("1B", torch.bfloat16), ("1B", torch.float32), ("grouped", torch.bfloat16))
    for batch, context in ((1, 64), (16, 64), (1, 512), (4, 512), (16, 512), (16, 2048))
]
CHUNKS = [(512, 0), (512, 512), (512, 1536), (16, 1008)]  # tokens, and what stands before them
TOKENS = (1, 4, 16, 512)
WIDTH = 2048
LAYOUTS = {"bf16": (None, 2 * WIDTH), "int8": (64, WIDTH + WIDTH // 32), "int4": (64, WIDTH // 2 + WIDTH // 32)}

Call = Callable[[int], object]  # it goes round over its inputs by the number


def seconds(call: Call, turn: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call(turn)
    return clock() - started


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            spent = seconds(call, turn)
            if turn >= 0:  # the first touches new memory
                times[name].append(spent)

    def ratio(name: str) -> float:
        return round(median(b / a for a, b in zip(times["ours"], times[name], strict=True)), 2)

    found: dict[str, Any] = {"us": round(median(times["ours"]) * 1e6, 1), "over_twin": ratio("twin")}
    return found | ({"share_of_read": ratio("read")} if "read" in calls else {})


def decoding(mib: int, rounds: int) -> Iterator[dict[str, Any]]:
    for heads, dtype, batch, context in DECODES:
        queries, kv_heads, size = HEADS[heads]
        used = -(-context // BLOCK)
        sets = max(2, mib * 2**20 // (2 * batch * used * BLOCK * kv_heads * size * dtype.itemsize))
        cache = torch.randn(sets, 2, batch * used, BLOCK, kv_heads, size, dtype=dtype)
        tables = torch.randperm(batch * used).to(torch.int32).view(batch, used)
        q, lengths = torch.randn(batch, queries, size), torch.full((batch,), context, dtype=torch.int32)

        def attend(function: Callable[..., Tensor], turn: int, *arguments: Any) -> Tensor:
            cache, q, tables, lengths = arguments
            return function(q, *cache[turn % len(cache)], tables, lengths)

        def read(turn: int, cache: Tensor = cache) -> Tensor:
            return cache[turn % len(cache)].view(torch.float32).amax()

        arguments = (cache, q, tables, lengths)
        calls: dict[str, Call] = {
            "ours": lambda turn, a=arguments: attend(tolkernels.decode_attention, 3 * turn, *a),
            "twin": lambda turn, a=arguments: attend(attention.decode_attention_torch, 3 * turn + 1, *a),
            "read": lambda turn, read=read: read(3 * turn + 2),
        }
        what = {"heads": heads, "cache": str(dtype).split(".")[1], "batch": batch, "context": context}
        yield {"kernel": "decode_attention"} | what | in_turns(calls, rounds)


def chunks(rounds: int) -> Iterator[dict[str, Any]]:
    queries, kv_heads, size = HEADS["1B"]
    for tokens, before in CHUNKS:
        used = -(-(tokens + before) // BLOCK)
        caches = torch.randn(4, 2, used, BLOCK, kv_heads, size)
        table, q = torch.randperm(used).to(torch.int32), torch.randn(tokens, queries, size)
        calls: dict[str, Call] = {
            name: lambda turn, f=function, c=caches, a=(q, table, tokens + before): f(a[0], *c[turn % 4], *a[1:])
            for name, function in (("ours", tolkernels.chunk_attention), ("twin", attention.chunk_attention_torch))
        }
        yield {"kernel": "chunk_attention", "tokens": tokens, "before": before} | in_turns(calls, rounds)


def small_kernels(rounds: int) -> Iterator[dict[str, Any]]:
    queries, kv_heads, size = HEADS["1B"]
    data, weight = torch.randint(64, (4096, LAYERS * 2 * WIDTH), dtype=torch.uint8), torch.rand(WIDTH)
    for tokens in TOKENS:
        x, qkv = torch.randn(tokens, WIDTH), torch.randn(tokens, (queries + 2 * kv_heads) * size)
        slots, cache = torch.randperm(4096)[:tokens], torch.zeros(2, 64, BLOCK, kv_heads, size, dtype=torch.bfloat16)
        angles, places = torch.randn(2, tokens, size), torch.randperm(64 * BLOCK)[:tokens]
        pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
            "rms_norm": tuple(  # type: ignore[dict-item]
                lambda turn, f=f, x=x: f(x, weight, 1e-5) for f in (tolkernels.rms_norm, gather.rms_norm_torch)
            ),
            "store_kv": tuple(  # type: ignore[dict-item]
                lambda turn, f=f, a=(qkv, *angles, places, *cache): f(*a)
                for f in (tolkernels.store_kv, attention.store_kv_torch)
            ),
        }
        for values, (group, row) in LAYOUTS.items():
            how = {"values": values, "group_size": group}
            pairs[f"add_rows {values}"] = tuple(  # type: ignore[assignment]
                lambda turn, f=f, a=(data, slots, x, weight, 1e-5), how=how, row=row: f(
                    *a, offset=turn % LAYERS * row, **how
                )
                for f in (tolkernels.add_rows, gather.add_rows_torch)
            )
        for name, (ours, twin) in pairs.items():
            yield {"kernel": name, "tokens": tokens} | in_turns({"ours": ours, "twin": twin}, 8 * rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=int, default=768, help="keys and values to go round over: more than all caches")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    most, results = torch.get_num_threads(), []
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        for kind in (partial(decoding, options.mib), chunks, small_kernels):
            for found in kind(options.rounds):
                results.append({"threads": threads} | found)
                print(results[-1], flush=True)
    torch.set_num_threads(most)
    write({"benchmark": "attention", "machine": machine(), "results": results}, options.out)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
