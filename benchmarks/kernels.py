"""Every kernel at the shapes of a decode step: microseconds, share of the device's copy rate, torch's own beside it.

    python benchmarks/kernels.py --device cuda --out benchmarks/results/kernels-cuda.json
    python benchmarks/kernels.py --size small                     (a minute on a CPU, with what the CPU would run)

On CUDA a case is captured in a CUDA graph of many calls, as the engine runs them, so that launching costs nothing. The
calls go round over inputs that are together larger than the second-level cache. No input is zeros. The copy rate counts
bytes read and bytes written. `us` is the median over replays; `torch_us` the same for torch's way to the same result,
for a quantised weight its 16-bit product; `torch_packed_us` is that of its own kernels for such weights.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from report import machine, write
from torch import Tensor

import tolkernels
from tolkernels.attention import decode_attention_torch, store_kv_torch
from tolkernels.formats import Encoding
from tolkernels.gather import add_rows_torch, lookup_slots_torch, rms_norm_torch

SPREAD = {"cuda": 256 << 20, "cpu": 16 << 20}  # bytes of inputs to go round over: twice the largest GPUs' caches
CALLS, REPLAYS = 48, 15
BLOCK = 16


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    vocabulary: int
    contexts: tuple[int, ...]
    tokens: tuple[int, ...]


SHAPES = {
    "1B": Shape(2048, 32, 128_256, (512, 2048), (1, 4, 16, 32, 64, 512)),
    "small": Shape(128, 2, 1000, (32, 64), (1, 4, 80)),
}


Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """`make()` builds one of several equal inputs and returns what runs on it: ours as "us", others by their names."""

    name: str
    moved: int  # bytes that must be read and written
    make: Callable[[], dict[str, Call]]


def seconds(calls: list[Call], device: str) -> float:
    """Time of one call."""
    rounds = max(CALLS // len(calls), 1) if device == "cuda" else 1
    for call in calls:
        call()
    if device == "cpu":
        took = []
        for _ in range(5):
            start = time.perf_counter()
            for call in calls:
                call()
            took.append(time.perf_counter() - start)
        return median(took) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    took = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end) / 1e3)
    return median(took) / (rounds * len(calls))


def measure(case: Case, device: str, copy_rate: float) -> dict[str, Any]:
    copies = min(max(-(-SPREAD[device] // case.moved), 2), 32)
    made = [case.make() for _ in range(copies)]
    took: dict[str, Any] = {}
    for name in made[0]:
        try:
            took[name] = seconds([calls[name] for calls in made], device)
        except RuntimeError as error:
            if name != "torch_packed_us":
                raise
            print(f"{case.name}: torch refuses: {error}", flush=True)  # its own kernels run on some GPUs alone
    rate = case.moved / took["us"]
    found = {"case": case.name} | {name: round(time * 1e6, 2) for name, time in took.items()}
    return found | {"GB_per_s": round(rate / 1e9, 2), "share_of_copy": round(rate / copy_rate, 3)}


def copy_rate(device: str) -> float:
    """Bytes per second of a device copy, reads and writes."""
    size = SPREAD[device]
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)], device)


def both(ours: Callable[..., object], twin: Callable[..., object], *arguments: Any) -> dict[str, Call]:
    return {"us": lambda: ours(*arguments), "torch_us": lambda: twin(*arguments)}


def packed(x: Tensor, outputs: int, encoding: Encoding) -> Call:
    """Torch's own product with a random quantised weight."""
    inputs = x.shape[1]
    if encoding == "int8":
        values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=x.device)
        scales = torch.rand(outputs, device=x.device).to(x.dtype)
        return lambda: torch._weight_int8pack_mm(x, values, scales)
    values = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8, device=x.device)
    tiles = torch._convert_weight_to_int4pack(values, 8)
    scales = torch.rand(inputs // 32, outputs, 2, device=x.device).to(torch.bfloat16)
    return lambda: torch._weight_int4pack_mm(x, tiles, 32, scales)


class Cases:
    """The cases of a shape. Streams are of `dtype`, all tensors on `device`."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device).to(self.dtype)

    def small(self) -> Iterator[Case]:
        hidden = self.shape.hidden
        weight = torch.rand(hidden, device=self.device)
        for tokens in self.shape.tokens[:4:3]:
            stream = tokens * hidden * self.dtype.itemsize

            def norm(tokens: int = tokens) -> dict[str, Call]:
                x = self.randn(tokens, hidden)
                return both(tolkernels.rms_norm, rms_norm_torch, x, weight, 1e-5)

            yield Case(f"rms_norm, {tokens} tokens", 2 * stream, norm)
            for values, bits in (("bf16", 16), ("int8", 8), ("int4", 4)):
                for in_host in (False, True):
                    row = hidden * bits // 8 + (hidden // 64 * 2 if bits < 16 else 0)
                    place = "host memory" if in_host else "the arena"
                    yield Case(
                        f"add_rows {values} from {place}, {tokens} tokens",
                        tokens * row + 3 * stream,
                        lambda t=tokens, v=values, r=row, h=in_host: self.rows(t, v, r, weight, in_host=h),
                    )

    def rows(self, tokens: int, values: str, row: int, weight: Tensor, *, in_host: bool) -> dict[str, Call]:
        data = torch.randint(60, (256, row), dtype=torch.uint8)  # small exponents: ordinary numbers as bf16
        host = (data.pin_memory() if self.device == "cuda" else data) if in_host else None
        slots = torch.randint(256, (tokens,), device=self.device)
        stream, arena = self.randn(tokens, self.shape.hidden), data.to(self.device)
        layout = {"offset": 0, "values": values, "group_size": None if values == "bf16" else 64}
        inside = (arena, slots, stream, weight, 1e-5)
        places = (arena, -1 - slots if in_host else slots, stream, weight, 1e-5)
        # torch cannot read a row in place within a graph: its time is that of rows in the arena.
        return {
            "us": lambda: tolkernels.add_rows(*places, **layout, host=host),
            "torch_us": lambda: add_rows_torch(*inside, **layout),
        }

    def attention(self) -> Iterator[Case]:
        heads, size = self.shape.heads, self.shape.hidden // self.shape.heads
        for batch in (1, 32):
            width = heads * size * self.dtype.itemsize
            yield Case(f"store_kv, {batch} tokens", 6 * batch * width, lambda b=batch: self.store(b))
            for context in self.shape.contexts:
                yield Case(
                    f"decode_attention, batch {batch}, context {context}",
                    2 * batch * context * width,
                    lambda b=batch, c=context: self.attend(b, c),
                )

    def cache(self, blocks: int) -> tuple[Tensor, Tensor]:
        heads = self.shape.heads
        return tuple(self.randn(blocks, BLOCK, heads, self.shape.hidden // heads) for _ in range(2))

    def store(self, tokens: int) -> dict[str, Call]:
        keys, values = self.cache(tokens)
        angles = torch.rand(tokens, keys.shape[3], device=self.device)
        places = torch.randperm(tokens * BLOCK, device=self.device)[:tokens]
        call = (self.randn(tokens, 3 * self.shape.hidden), angles, angles, places, keys, values)
        return both(tolkernels.store_kv, store_kv_torch, *call)

    def attend(self, batch: int, context: int) -> dict[str, Call]:
        keys, values = self.cache(batch * context // BLOCK)
        order = torch.randperm(len(keys), device=self.device).int()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=self.device)
        q = self.randn(batch, *keys.shape[2:])
        call = (q, keys, values, order.view(batch, -1), lengths)
        return both(tolkernels.decode_attention, decode_attention_torch, *call)

    def linears(self) -> Iterator[Case]:
        hidden = self.shape.hidden
        encodings: tuple[Encoding, ...] = ("bfloat16", "int8", "int4")
        for name, outputs in (("qkv", 3 * hidden), ("out", hidden), ("head", self.shape.vocabulary)):
            for encoding in encodings:
                for tokens in self.shape.tokens:
                    bits = {"bfloat16": 16, "int8": 8, "int4": 4.5}[encoding]
                    moved = int(outputs * hidden * bits / 8) + tokens * (hidden + outputs) * self.dtype.itemsize
                    yield Case(
                        f"linear {encoding} {name}, {tokens} tokens",
                        moved,
                        lambda n=outputs, e=encoding, t=tokens: self.linear(n, e, t),
                    )

    def linear(self, outputs: int, encoding: Encoding, tokens: int) -> dict[str, Call]:
        matrix = self.randn(outputs, self.shape.hidden)
        weight = tolkernels.make_weight(matrix, encoding)
        x, residual = self.randn(tokens, self.shape.hidden), self.randn(tokens, outputs)
        calls: dict[str, Call] = {
            "us": lambda: tolkernels.linear(x, weight, residual),
            "torch_us": lambda: F.linear(x, matrix) + residual,
        }
        if self.device == "cuda" and encoding != "bfloat16" and torch.cuda.get_device_capability() >= (8, 0):
            calls["torch_packed_us"] = packed(x, outputs, encoding)
        return calls

    def lookup(self) -> Iterator[Case]:
        def make() -> dict[str, Call]:
            tokens = torch.randint(self.shape.vocabulary, (32,), device=self.device)
            maps = torch.randint(-1, 9, (2, self.shape.vocabulary), dtype=torch.int32, device=self.device)
            call = (tokens, maps[0], maps[1])
            return both(tolkernels.lookup_slots, lookup_slots_torch, *call)

        yield Case("lookup_slots, 32 tokens", 32 * 25, make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of streams; CPU: float32")
    parser.add_argument("--size", choices=SHAPES, default="1B")
    parser.add_argument("--only", default="", metavar="WORD", help="only cases whose name begins so")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))
    torch.manual_seed(0)
    cases = Cases(SHAPES[arguments.size], arguments.device, dtype)
    rate = copy_rate(arguments.device)
    found = []
    with torch.inference_mode():
        for group in (cases.lookup, cases.small, cases.attention, cases.linears):
            for case in group():
                if case.name.startswith(arguments.only):
                    found.append(measure(case, arguments.device, rate))
                    print(found[-1], flush=True)
    facts = {"size": arguments.size, "dtype": str(dtype), "copy_GB_per_s": round(rate / 1e9, 1), "replays": REPLAYS}
    write(machine(arguments.device) | facts | {"cases": found}, arguments.out)


if __name__ == "__main__":
    main()
