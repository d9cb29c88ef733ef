"""gather_rows: the torch twin against float64 numpy, and the Triton kernel, where there is one, against the twin."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolkernels import gather_rows
from tolkernels.dispatch import triton_installed, use_triton
from tolkernels.gather import gather_rows_torch

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BF16: dict[str, Any] = {"values": "bf16", "group_size": None}
# Half a unit in the last place of a sum, plus as much for the row's own rounding.
RELATIVE = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def case(slots: int, layers: int, width: int, tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """An arena of bf16 rows as they are, [slots, layers, width], and as bytes; each token's slot; the stream."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(slots, layers, width, generator=generator).to(torch.bfloat16)
    return (
        rows,
        rows.view(torch.uint8).flatten(1),
        torch.randint(slots, (tokens,), generator=generator),
        torch.randn(tokens, width, generator=generator).to(dtype),
    )


@settings(max_examples=40)
@given(
    slots=st.integers(1, 9),
    layers=st.integers(1, 4),
    width=st.integers(1, 70),
    tokens=st.integers(0, 12),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_rows_are_added(
    slots: int, layers: int, width: int, tokens: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    rows, arena, chosen, residual = case(slots, layers, width, tokens, dtype, seed)
    before = arena.clone(), chosen.clone(), residual.clone()
    layer = data.draw(st.integers(0, layers - 1))
    found = gather_rows(arena, chosen, residual, offset=2 * layer * width, **BF16)
    assert found.dtype == dtype
    assert found.shape == residual.shape
    for token in range(tokens):
        row = rows[chosen[token], layer].double().numpy()
        stream = residual[token].double().numpy()
        error = np.abs(found[token].double().numpy() - (stream + row))
        assert (error <= RELATIVE[dtype] * (np.abs(stream) + np.abs(row)) + 1e-7).all()
    assert all(torch.equal(a, b) for a, b in zip((arena, chosen, residual), before, strict=True))


def test_a_float32_stream_takes_the_row_unrounded() -> None:
    rows, arena, chosen, residual = case(5, 3, 64, 7, torch.float32, 1)
    expected = residual.numpy() + rows[chosen, 2].float().numpy()
    assert np.array_equal(gather_rows(arena, chosen, residual, offset=256, **BF16).numpy(), expected)


def good() -> dict[str, Any]:
    _, data, slots, residual = case(4, 2, 8, 3, torch.float32, 0)
    return {"data": data, "slots": slots, "residual": residual, "offset": 16, **BF16}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", torch.zeros(4, 32)),
        ("data", torch.zeros(4, 2, 8, dtype=torch.uint8)),
        ("slots", torch.zeros(3, dtype=torch.int32)),
        ("slots", torch.zeros(3, 1, dtype=torch.int64)),
        ("offset", 18),
        ("offset", 15),
        ("offset", -2),
        ("values", "int3"),
        ("group_size", 8),
        ("factor", torch.zeros(8, 9)),
        ("factor", torch.zeros(8, 8, dtype=torch.bfloat16)),
        ("factor", torch.zeros(8)),
        ("offset", 0x7FFFFFFF),
        ("residual", torch.zeros(2, 8)),
        ("residual", torch.zeros(3, 8, dtype=torch.int64)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        gather_rows(**good() | {name: value})


@pytest.mark.parametrize("group_size", [None, 0, -8, 3, 16])
def test_scales_that_do_not_divide_a_row_are_refused(group_size: int | None) -> None:
    with pytest.raises(ValueError, match="group_size"):
        gather_rows(**good() | {"values": "int8", "group_size": group_size})


@pytest.mark.parametrize(("values", "size"), [("bf16", 24), ("int8", 14), ("int4", 8)])
def test_a_row_ends_within_its_slot(values: str, size: int) -> None:
    """12 values: 24 bytes; 12 and a scale; 6 and a scale."""
    stream, slots = torch.zeros(2, 12), torch.tensor([1, 0])
    layout = {"offset": 2, "values": values, "group_size": None if values == "bf16" else 12}
    gather_rows(torch.zeros(2, 2 + size, dtype=torch.uint8), slots, stream, **layout)
    with pytest.raises(ValueError, match="does not fit"):
        gather_rows(torch.zeros(2, 1 + size, dtype=torch.uint8), slots, stream, **layout)


def test_a_factor_turns_coordinates_into_a_row() -> None:
    rows, arena, chosen, _ = case(5, 2, 8, 7, torch.float32, 4)
    factor, residual = torch.randn(8, 20), torch.randn(7, 20)
    found = gather_rows(arena, chosen, residual, offset=16, **BF16, factor=factor)
    expected = residual.double() + rows[chosen, 1].double() @ factor.double()
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_a_slot_out_of_range_is_an_error_in_the_twin() -> None:
    with pytest.raises(IndexError):
        gather_rows(**good() | {"slots": torch.tensor([0, 1, 4])})


def test_the_cpu_takes_the_twin() -> None:
    assert not use_triton(torch.device("cpu"))
    assert use_triton(torch.device("cuda")) == triton_installed()


COMPARE = """
import sys, torch
from tolkernels.gather import gather_rows_torch
from tolkernels.gather_triton import gather_rows_triton
device = sys.argv[1]
def compare(kernel, twin, residual):
    # The interpreter truncates to bfloat16 where hardware rounds: a unit in the last place of the row, and of the sum.
    row, total = (twin.double() - residual.double()).abs(), twin.double().abs()
    exact = device == "cuda" or kernel.dtype != torch.bfloat16
    bound = 0 if exact else 2**-7 * 1.01 * (row + total) + 1e-6
    assert kernel.dtype == twin.dtype
    assert ((kernel.double() - twin.double()).abs() <= bound).all()
ENCODED = [("bf16", None, 2), ("int8", 16, 1), ("int8", 64, 1), ("int4", 16, 0.5), ("int4", 64, 0.5)]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for values, group_size, value_bytes in ENCODED:
        for width in (64, 960, 1024, 2048, 2112) + ((1, 2051) if values == "bf16" else ()):
            # Random bytes, but for scales and bf16 values, which are to be ordinary numbers.
            start, end, stride = 38, 38 + int(width * value_bytes), 38 + 3 * width
            data = torch.randint(256, (7, stride // 2 * 2), dtype=torch.uint8)
            numbers = data.view(torch.bfloat16)[:, (end if group_size else start) // 2 :]
            numbers.copy_(torch.randn(numbers.shape))
            data = data.to(device)
            slots = torch.randint(7, (5,)).to(device)
            residual = torch.randn(5, 2 * width).to(dtype).to(device)[:, :width]
            layout = {"offset": start, "values": values, "group_size": group_size}
            twin = gather_rows_torch(data, slots, residual, **layout)
            kernel = gather_rows_triton(data, slots, residual, **layout)
            compare(kernel, twin, residual)
            assert not torch.equal(kernel, residual)
            if width > 1000 or dtype == torch.float16:
                continue
            # A factor of ones in a diagonal: the row's own numbers again, in the first columns.
            stream = torch.zeros(5, 2500, dtype=dtype, device=device)
            factor = torch.eye(width, 2500, dtype=dtype, device=device)
            twin = gather_rows_torch(data, slots, stream, **layout, factor=factor)
            kernel = gather_rows_triton(data, slots, stream, **layout, factor=factor)
            compare(kernel, twin, stream)
    empty = gather_rows_triton(data, slots[:0], residual[:0], **layout)
    assert empty.shape == (0, 2112)
"""


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA]),
    ],
)
def test_the_kernel_equals_its_twin(device: str) -> None:
    """On a CPU through Triton's interpreter, which must be chosen before triton is imported: hence a process."""
    interpret = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    kernels = Path(__file__).parents[2] / "kernels"
    environment = os.environ | {"PYTHONPATH": str(kernels)} | interpret
    done = subprocess.run([sys.executable, "-c", COMPARE, device], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_cuda_takes_the_kernel_and_gets_the_twins_bits() -> None:
    _, data, slots, residual = (tensor.cuda() for tensor in case(9, 4, 2048, 33, torch.bfloat16, 3))
    layout = {"offset": 2 * 2 * 2048, **BF16}
    assert torch.equal(gather_rows(data, slots, residual, **layout), gather_rows_torch(data, slots, residual, **layout))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tolkernels.gather_triton import BLOCK, _gather_kernel
names = _gather_kernel.arg_names
for bits, row, dtype in ((16, "*bf16", "*fp32"), (8, "*i8", "*bf16"), (4, "*u8", "*fp16")):
    pointers = {"rows": row, "scales": "*bf16", "slots": "*i64", "residual": dtype, "out": dtype}
    constants = {"bits": bits, "group": 64, "add": True, "block": BLOCK}
    signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=_gather_kernel, signature=signature, constexprs=places)
    for capability in (75, 80, 86, 89, 90):
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


@pytest.mark.skipif(not triton_installed(), reason="triton is not installed")
def test_the_kernel_compiles_for_every_gpu_it_is_meant_for(tmp_path: Path) -> None:
    """With Triton's own assembler; no GPU is needed."""
    kernels = Path(__file__).parents[2] / "kernels"
    environment = os.environ | {"PYTHONPATH": str(kernels), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
