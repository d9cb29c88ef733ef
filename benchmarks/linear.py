"""How fast a CPU multiplies by weights that come from memory: ours in every encoding, and torch's own ways.

    python benchmarks/linear.py --out results/linear-cpu.json

A way goes through copies of its weight that no cache holds, in turns with a plain sum over as many bytes as it reads:
`share` is the median ratio of the two times, and 1.0 the bandwidth of the memory. For many tokens the turns are with
float32 `F.linear` instead: `over_float32` is how many times as fast. `error` is the root mean square of what an output
is off by, over that of the outputs, against float64 with the way's own rounded weights: what the arithmetic costs.
`error_outlier`: the same, where one in 256 activations is 30 times as large, as in trained models.

With `--threads 1` times are the thread's processor time, which other programs on the machine disturb less. Needs Linux
and a C compiler.
"""

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from report import machine, write
from torch import Tensor

from tolkernels import Encoding, Weight, embedding_rows, linear, linear_cpu, make_weight

READ = """
typedef long vector __attribute__((vector_size(64), aligned(8), may_alias));
double read_all(const char *p, long bytes, int threads) {
    double all = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : all)
    for (long at = 0; at < bytes / 4096; at++) {
        const vector *page = (const vector *)(p + at * 4096);
        vector a = {0}, b = {0}, c = {0}, d = {0};
        for (int i = 0; i < 64; i += 4) a += page[i], b += page[i + 1], c += page[i + 2], d += page[i + 3];
        a += b + c + d;
        all += a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
    }
    return all;
}
"""
MANY_TOKENS = 64  # from here on a way is compared with float32 products, before with reading


@dataclass
class Way:
    """One way to multiply: multiply-adds of a token, bytes it reads, fresh copies of it, and the values that it rounded
    the first rows to."""

    name: str
    products: int
    bytes: int
    copies: Callable[[], Callable[[Tensor], Tensor]]
    values: Tensor


def reader() -> Callable[[Tensor], None]:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(READ)
        compiled = ["-O3", "-march=native", "-fPIC", "-shared", "-fopenmp"]
        subprocess.run(["cc", *compiled, "-c", "-o", f"{library}.o", str(source)], check=True)
        subprocess.run(["cc", "-shared", "-o", str(library), f"{library}.o"], check=True)  # torch's OpenMP, as ours
        function = ctypes.CDLL(str(library)).read_all
    function.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    return lambda tensor: function(tensor.data_ptr(), tensor.nbytes, torch.get_num_threads())


def ours(matrix: Tensor, encoding: Any) -> Way:
    weight = make_weight(matrix, encoding)

    def copy() -> Callable[[Tensor], Tensor]:
        data, scales = linear_cpu.empty(*weight.shape, encoding, torch.device("cpu"))
        data.copy_(weight.data)
        if scales is not None and weight.scales is not None:
            scales.copy_(weight.scales)
        return partial(linear, weight=Weight(weight.shape, encoding, "panels", data, scales))

    some = embedding_rows(torch.arange(min(512, weight.shape[0])), weight, torch.float32)
    return Way(f"ours {encoding}", matrix.numel(), weight.nbytes // 8 * 8, copy, some)


def torch_ways(matrix: Tensor) -> list[Way]:
    bf16, half = matrix.bfloat16(), matrix.half()
    scales = matrix.abs().amax(1) / 127
    int8 = (matrix / scales.unsqueeze(1)).round().to(torch.int8)
    values8 = int8[:512] * scales[:512].unsqueeze(1)
    per_row = torch.quantize_per_channel(matrix, scales.double(), torch.zeros(len(matrix)).long(), 0, torch.qint8)
    four = torch.randint(0, 16, matrix.shape, dtype=torch.int32)
    sizes = torch.randn(matrix.shape[1] // 32, len(matrix), 2).mul_(0.01).bfloat16()
    values4 = (
        (four - 8).unflatten(1, (-1, 32)) * sizes[..., 0].T.float().unsqueeze(2) + sizes[..., 1].T.float().unsqueeze(2)
    ).flatten(1)[:512]

    def in_bf16(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: product(x.bfloat16()).float()

    def plain() -> Callable[[Tensor], Tensor]:
        return partial(F.linear, weight=matrix.clone())

    def plain_bf16() -> Callable[[Tensor], Tensor]:
        return in_bf16(partial(F.linear, weight=bf16.clone()))

    def packed_bf16() -> Callable[[Tensor], Tensor]:
        held = torch.ops.mkldnn._reorder_linear_weight(bf16)
        return in_bf16(lambda x: torch.ops.mkldnn._linear_pointwise(x, held, None, "none", [], ""))

    def packed_half() -> Callable[[Tensor], Tensor]:
        held, bias = torch.fbgemm_pack_gemm_matrix_fp16(matrix), torch.zeros(len(matrix))
        return lambda x: torch.fbgemm_linear_fp16_weight_fp32_activation(x, held, bias)

    def dynamic(engine: str) -> Callable[[Tensor], Tensor]:
        torch.backends.quantized.engine = engine
        held = torch.ops.quantized.linear_prepack(per_row, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, held)

    def pack8() -> Callable[[Tensor], Tensor]:
        held, factors = int8.clone(), scales.bfloat16()
        return in_bf16(lambda x: torch._weight_int8pack_mm(x, held, factors))

    def pack4() -> Callable[[Tensor], Tensor]:
        held = torch._convert_weight_to_int4pack_for_cpu(four, 2)
        return in_bf16(lambda x: torch._weight_int4pack_mm_for_cpu(x, held, 32, sizes))

    count = matrix.numel()
    return [
        Way("F.linear float32", count, 4 * count, plain, matrix[:512]),
        Way("F.linear bfloat16", count, 2 * count, plain_bf16, bf16[:512].float()),
        Way("mkldnn _linear_pointwise bfloat16, packed", count, 2 * count, packed_bf16, bf16[:512].float()),
        Way("fbgemm float16, float32 activations", count, 2 * count, packed_half, half[:512].float()),
        Way("dynamic int8, fbgemm", count, count, partial(dynamic, "fbgemm"), values8),
        Way("dynamic int8, onednn", count, count, partial(dynamic, "onednn"), values8),
        Way("_weight_int8pack_mm", count, count, pack8, values8),
        Way("_weight_int4pack_mm_for_cpu", count, count * 9 // 16, pack4, values4),
    ]


def seconds(call: Callable[[], object]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    call()
    return clock() - started


def relative_error(way: Way, product: Callable[[Tensor], Tensor], outliers: bool) -> float:
    x = torch.randn(16, way.values.shape[1], generator=torch.Generator().manual_seed(1))
    if outliers:
        x[:, ::256] *= 30
    exact = x.double() @ way.values.double().T
    error = product(x)[:, : len(way.values)].double() - exact
    return float(f"{(error.pow(2).mean() / exact.pow(2).mean()).sqrt():.2g}")


@dataclass
class Bench:
    tokens: list[int]
    rounds: int
    copied: int  # bytes of copies
    ceiling: Tensor  # bytes to read
    read: Callable[[Tensor], None]

    def measure(self, way: Way, plain: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        products = [way.copies() for _ in range(max(2, min(64, -(-self.copied // way.bytes))))]
        found: dict[str, Any] = {
            "bytes": way.bytes,
            "error": relative_error(way, products[0], outliers=False),
            "error_outlier": relative_error(way, products[0], outliers=True),
        }
        for tokens in self.tokens:
            x = torch.randn(tokens, way.values.shape[1])
            if tokens < MANY_TOKENS:
                pieces = self.ceiling[: len(self.ceiling) // way.bytes * way.bytes].view(-1, way.bytes)
                against = [partial(self.read, piece) for piece in pieces]
                turns = self.rounds * min(len(products), 12)
            else:
                against, turns = [partial(plain, x)], self.rounds
            times, others = [], []
            for turn in range(turns):
                others.append(seconds(against[turn % len(against)]))
                times.append(seconds(partial(products[turn % len(products)], x)))
            found[f"tokens_{tokens}"] = summary(way, tokens, times, others)
        return found


def summary(way: Way, tokens: int, times: list[float], others: list[float]) -> dict[str, float]:
    middle = statistics.median(times)
    ratio = statistics.median(other / time for other, time in zip(others, times, strict=True))
    return {
        "ms": round(middle * 1e3, 3),
        "gb_per_s": round(way.bytes / middle / 1e9, 1),
        "gmac_per_s": round(way.products * tokens / middle / 1e9, 1),
        "share" if tokens < MANY_TOKENS else "over_float32": round(ratio, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="6144x2048,2048x2048,128256x2048", help="outputs x inputs, comma-separated")
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default=[1, 4, 16, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=600, help="of copies, more than the caches hold")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    memory = mmap(-1, 1 << 30, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    memory.madvise(MADV_HUGEPAGE)  # as our weights have
    ceiling = torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    bench = Bench(options.tokens, options.rounds, options.mib * 2**20, ceiling, reader())
    results: dict[str, Any] = {}
    for name in options.shapes.split(","):
        outputs, inputs = (int(n) for n in name.split("x"))
        matrix = torch.randn(outputs, inputs).mul_(0.02)
        plain = partial(F.linear, weight=matrix)
        ways = [partial(ours, matrix, encoding) for encoding in get_args(Encoding)]
        results[name] = {}
        for way in chain((make() for make in ways), torch_ways(matrix)):
            results[name][way.name] = bench.measure(way, plain)
            print(name, way.name, results[name][way.name], flush=True)
    rate = statistics.median(seconds(partial(bench.read, ceiling)) for _ in range(9))
    found = {"clock": "thread's processor time" if options.threads == 1 else "wall"}
    write(machine() | found | {"read_gb_per_s": round(len(ceiling) / rate / 1e9, 1), "shapes": results}, options.out)


if __name__ == "__main__":
    main()
