"""Builds every Triton kernel for every GPU generation it is meant for, without a GPU: registers, spills, shared memory.

    python benchmarks/compile_kernels.py --out benchmarks/results/kernels-compiled.json

What is built is what the package would launch: its own functions run on CPU tensors of the 1B shape, and each launch is
written down instead of made. Triton compiles it with its own assembler, and cuobjdump reads the result's resources.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from report import machine, write
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tolkernels import attention_triton, gather_triton, linear_triton

# Compute capability to the precision of its streams: before 8.0 there is no bfloat16 arithmetic.
TARGETS = {75: torch.float16} | dict.fromkeys((80, 86, 89, 90, 120), torch.bfloat16)
HIDDEN, HEADS, SIZE, VOCABULARY = 2048, 32, 64, 128_256  # the 1B shape
NAMES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}
NAMES |= {torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"}
OPTIONS = ("num_warps", "num_stages")


@dataclass
class Launch:
    """A kernel and its arguments as Triton would specialise them."""

    case: str
    kernel: JITFunction[Any]
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[tuple[int, ...], Any] = field(default_factory=dict)
    aligned: dict[tuple[int, ...], list[list[Any]]] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)

    def compile(self, capability: int) -> dict[str, Any]:
        source = ASTSource(self.kernel, self.signature, self.constants, self.aligned)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return {"case": self.case, "kernel": self.kernel.__name__, "sm": capability} | resources(built)


def resources(built: Any) -> dict[str, int]:
    """Registers a thread, bytes of local memory a thread (spills), bytes of shared memory a program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
    }


def launch_of(case: str, kernel: JITFunction[Any], positional: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """Pointers and integers that divide by 16 are known to, and a 1 is a constant: Triton's own rules."""
    launch = Launch(case, kernel, options={name: named.pop(name) for name in OPTIONS if name in named})
    arguments = dict(zip(kernel.arg_names, positional, strict=False)) | named
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor):
            launch.signature[parameter.name] = NAMES[value.dtype]
            aligned = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
        elif parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            launch.signature[parameter.name], aligned = "constexpr", False
            launch.constants[index,] = value
        else:
            launch.signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            launch.aligned[index,] = [["tt.divisibility", 16]]
    return launch


def launches(case: str, call: Callable[[], object]) -> list[Launch]:
    """The launches that `call` would make."""
    made: list[Launch] = []

    def note(self: JITFunction[Any], *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        made.append(launch_of(case, self, positional, named))

    original = JITFunction.run
    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = original
    return made


def cases(dtype: torch.dtype, *, brief: bool) -> Iterator[Launch]:
    """What a server of the 1B shape launches; `brief`: every kernel at least once, but not every way to call it."""
    batches = (1, 16) if brief else (1, 4, 16, 32, 64)
    yield from launches("lookup_slots", lambda: gather_triton.lookup_slots_triton(*lookup_arguments()))
    for values in ("int4",) if brief else ("bf16", "int8", "int4"):
        yield from launches(f"add_rows {values}", lambda values=values: add_rows(dtype, values, None))
    yield from launches("add_rows lowrank-int8", lambda: add_rows(dtype, "int8", 64))
    yield from launches("add_rows bf16, scaled", lambda: add_rows(dtype, "bf16", None, scaled=True))
    yield from launches("store_kv", lambda: store_kv(dtype))
    for batch, kv_heads in ((1, HEADS),) if brief else ((1, HEADS), (32, HEADS), (1, HEADS // 4)):
        case = f"decode_attention batch {batch}, {kv_heads} kv heads"
        yield from launches(case, lambda b=batch, n=kv_heads: attend(dtype, b, n))
    for bits in (4,) if brief else (8, 4):
        for tokens in batches if dtype == torch.bfloat16 else (1,):  # quantised_linear says why
            case = f"linear int{bits}, {tokens} tokens"
            yield from launches(case, lambda b=bits, t=tokens: quantised(dtype, b, t, HIDDEN))
            if tokens > 1 and not brief:
                yield from launches(f"{case}, head", lambda b=bits, t=tokens: quantised(dtype, b, t, VOCABULARY))
        yield from launches(f"embedding_rows int{bits}", lambda b=bits: quantised(dtype, b, 0, 0))
    x = torch.zeros(1, HIDDEN, dtype=dtype)
    yield from launches(
        "linear 16-bit, 1 token", lambda: linear_triton.vector_linear(x, x.new_empty(HIDDEN, HIDDEN), None, x)
    )


def lookup_arguments() -> tuple[Tensor, Tensor, Tensor]:
    slot_map = torch.zeros(256, dtype=torch.int32)
    return torch.zeros(4, dtype=torch.int64), slot_map, slot_map.clone()


def add_rows(dtype: torch.dtype, values: str, rank: int | None, scaled: bool = False) -> None:
    group_size = None if values == "bf16" else 32 if rank else 64
    data, stream = torch.zeros(4, 98_304, dtype=torch.uint8), torch.zeros(4, HIDDEN, dtype=dtype)
    slots, weight = torch.zeros(4, dtype=torch.int64), torch.ones(HIDDEN)
    factor = torch.zeros(rank, HIDDEN, dtype=dtype) if rank else None
    layout = {"offset": 0, "values": values, "group_size": group_size, "factor": factor}
    layout |= {"scale": torch.ones(4)} if scaled else {}
    gather_triton.add_rows_triton(data, slots, stream, weight, 1e-5, host=data.clone(), **layout)


def store_kv(dtype: torch.dtype) -> None:
    cache = torch.zeros(2, 16, HEADS, SIZE, dtype=dtype)
    angles, places = torch.zeros(4, SIZE), torch.zeros(4, dtype=torch.int64)
    attention_triton.store_kv_triton(torch.zeros(4, 3 * HIDDEN, dtype=dtype), angles, angles, places, cache, cache)


def attend(dtype: torch.dtype, batch: int, kv_heads: int) -> None:
    cache = torch.zeros(2, 16, kv_heads, SIZE, dtype=dtype)
    tables, lengths = torch.zeros(batch, 128, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
    attention_triton.decode_attention_triton(
        torch.zeros(batch, HEADS, SIZE, dtype=dtype), cache, cache, tables, lengths
    )


def quantised(dtype: torch.dtype, bits: int, tokens: int, outputs: int) -> None:
    """With no outputs: rows of the embedding."""
    rows = outputs or 16
    values = torch.empty(rows, HIDDEN * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(rows) if bits == 8 else torch.empty(rows, HIDDEN // 32, dtype=torch.bfloat16)
    if outputs:
        x = torch.zeros(tokens, HIDDEN, dtype=dtype)
        linear_triton.quantised_linear(x, values, scales, x.new_empty(tokens, rows) if rows == HIDDEN else None)
    else:
        linear_triton.quantised_rows(values, scales, dtype, torch.zeros(4, dtype=torch.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brief", action="store_true", help="every kernel, but not every way to call it")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compilations at once")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = [(launch, sm) for sm, dtype in TARGETS.items() for launch in cases(dtype, brief=arguments.brief)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        built = list(pool.map(lambda item: item[0].compile(item[1]), work))
    report = machine() | {"triton": triton.__version__, "shape": "1B", "kernels": built}
    if arguments.out is None:
        print(json.dumps(report))
    else:
        write(report, arguments.out)


if __name__ == "__main__":
    main()
