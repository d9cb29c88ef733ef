"""Linear maps: the compiled CPU kernels at every level of instructions, and the torch twin, against float64."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolkernels import Encoding, Weight, embedding_rows, fast_on_cpu, linear, linear_argmax, linear_cpu, make_weight
from tolkernels.linear import hold, linear_torch

ENCODINGS = get_args(Encoding)
KERNELS = Path(__file__).parents[2] / "kernels"
NEEDS_KERNELS = pytest.mark.skipif(not linear_cpu.available(), reason="the CPU kernels are not built")
LEVELS = range(1, linear_cpu.isa() + 1) if linear_cpu.available() else ()


def matrix(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, so that one scale for all would show."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(outputs, 1, generator=generator) * 4 - 2)
    return torch.randn(outputs, inputs, generator=generator) * sizes


def decoded(weight: Weight) -> Tensor:
    """The values that a product with it is about, [N, K] float64."""
    return embedding_rows(torch.arange(weight.shape[0]), weight, torch.float32).double()


def bound(x: Tensor, values: Tensor, encoding: str) -> Tensor:
    """What a sum in float32 may be off by, and a token's rounding to 16-bit integers: [T, N]."""
    magnitudes = x.double().abs() @ values.abs().T
    allowed = 2.0**-24 * (values.shape[1] ** 0.5 + 8) * magnitudes * 2
    if encoding in ("int8", "int4"):
        allowed += x.double().abs().amax(1, keepdim=True) / 65534 * 1.001 * values.abs().sum(1)
    return allowed + 1e-30


def compiled(x: Tensor, weight: Weight, residual: Tensor | None = None, **how: int) -> Tensor:
    return linear_cpu.linear(x, weight.data, weight.scales, weight.encoding, weight.shape[0], residual, **how)


@NEEDS_KERNELS
@settings(max_examples=150)
@given(
    encoding=st.sampled_from(ENCODINGS),
    level=st.sampled_from(LEVELS or [0]),
    outputs=st.integers(1, 100),
    groups=st.integers(1, 5),
    odd=st.integers(0, 15),
    tokens=st.integers(1, 40),
    threads=st.integers(1, 3),
    add=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_level_computes_the_product(
    encoding: Encoding,
    level: int,
    outputs: int,
    groups: int,
    odd: int,
    tokens: int,
    threads: int,
    add: bool,
    seed: int,
) -> None:
    inputs = 32 * groups + (0 if encoding == "int4" else 2 * odd)
    weight = make_weight(matrix(outputs, inputs, seed), encoding)
    values = decoded(weight)
    x = torch.randn(tokens, inputs) * 10 ** (torch.rand(tokens, 1) * 4 - 2)
    residual = torch.randn(tokens, outputs) if add else None
    out = compiled(x, weight, residual, level=level, threads=threads)
    expected = x.double() @ values.T + (residual.double() if residual is not None else 0)
    allowed = bound(x, values, encoding) + 2.0**-23 * expected.abs()
    assert out.shape == (tokens, outputs)
    assert ((out.double() - expected).abs() <= allowed).all()


@NEEDS_KERNELS
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(37, 4200, 64), (64, 300, 1056), (130, 70, 4096)])
def test_prompts_go_over_groups_of_panels(
    encoding: Encoding, level: int, tokens: int, outputs: int, inputs: int
) -> None:
    """Many tokens take another way through the weights: several groups, several blocks, more than one exact run."""
    weight = make_weight(matrix(outputs, inputs), encoding)
    values, x = decoded(weight), torch.randn(tokens, inputs)
    out = compiled(x, weight, level=level, threads=2)
    assert ((out.double() - x.double() @ values.T).abs() <= bound(x, values, encoding)).all()


@NEEDS_KERNELS
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_tokens_result_depends_on_nothing_beside_it(encoding: Encoding, level: int) -> None:
    """Neither on the tokens in the batch nor on the number of threads: the same bits."""
    weight = make_weight(matrix(200, 1120), encoding)
    x, residual = torch.randn(61, 1120), torch.randn(61, 200)
    all_at_once = compiled(x, weight, residual, level=level, threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(compiled(x, weight, residual, level=level, threads=threads), all_at_once)
    for count in (1, 2, 5, 6, 7, 11, 12, 13, 24, 25):
        alone = compiled(x[-count:], weight, residual[-count:], level=level, threads=2)
        assert torch.equal(alone, all_at_once[-count:])


def equal_rows(outputs: int, inputs: int, kinds: int, seed: int) -> Tensor:
    """A matrix of few different rows, so that most outputs equal others, of any panel."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(kinds, inputs, generator=generator)[torch.randint(kinds, (outputs,), generator=generator)]


@NEEDS_KERNELS
@settings(max_examples=150)
@given(
    encoding=st.sampled_from(ENCODINGS),
    level=st.sampled_from(LEVELS or [0]),
    outputs=st.integers(1, 700),
    inputs=st.sampled_from([32, 96]),
    tokens=st.integers(1, 40),
    threads=st.integers(1, 3),
    kinds=st.sampled_from([1, 3, 1000]),
    bad=st.sampled_from([None, float("nan"), float("inf"), float("-inf"), 0.0, -0.0]),
    seed=st.integers(0, 1000),
)
def test_the_largest_output_is_that_of_the_product(
    encoding: Encoding,
    level: int,
    outputs: int,
    inputs: int,
    tokens: int,
    threads: int,
    kinds: int,
    bad: float | None,
    seed: int,
) -> None:
    """Bit by bit: of equal outputs the first, which only then is the same; so with NaN, infinities and zeros."""
    weight = make_weight(equal_rows(outputs, inputs, kinds, seed), encoding)
    x = torch.randn(tokens, inputs)
    if bad is not None:
        x[seed % tokens] *= bad
    how = {"level": level, "threads": threads}
    found = linear_cpu.argmax(x, weight.data, weight.scales, encoding, outputs, **how)
    assert found.dtype == torch.int64
    assert torch.equal(found, compiled(x, weight, **how).argmax(-1))


@pytest.mark.parametrize("layout", ["rows", pytest.param("panels", marks=NEEDS_KERNELS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_output_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    """Written out: of equal ones the first, and a NaN before an infinity."""
    nan, inf = float("nan"), float("inf")
    x = torch.ones(5, 2, dtype=dtype)
    for outputs, first in [
        ([1, 3, 3, 2], 1),
        ([-3, -1, -2, -1], 1),
        ([5, nan, inf, nan], 1),
        ([2, -inf, inf, inf], 2),
        ([-inf] * 4, 0),
        ([-0.0, 0.0, -0.0, 0.0], 0),
    ]:
        weight = hold(torch.tensor([[each, 0] for each in outputs] * 20).float(), "float32", layout)
        assert linear_argmax(x, weight).tolist() == [first] * 5
    assert linear_argmax(x[:0], weight).shape == (0,)
    with pytest.raises(ValueError, match="x must be"):
        linear_argmax(x[:, :1], weight)


@pytest.mark.parametrize("layout", ["rows", pytest.param("panels", marks=NEEDS_KERNELS)])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_values_are_those_of_the_encoding(encoding: Encoding, layout: str) -> None:
    """Against the formats' definitions, written out number by number."""
    original = matrix(37, 96).numpy()
    original[5] = 0
    original[7, 32:64] = 0
    weight = hold(torch.from_numpy(original), encoding, layout)
    found = embedding_rows(torch.arange(37), weight, torch.float32).numpy()
    for row in range(37):
        if encoding == "int8":
            scale = np.float32(np.abs(original[row]).max() / np.float32(127))
            expected = np.rint(original[row] / scale) * scale if scale else original[row]
        elif encoding == "int4":
            expected = np.concatenate([four_bits(group) for group in original[row].reshape(3, 32)])
        else:
            expected = torch.from_numpy(original[row]).to(getattr(torch, encoding)).float().numpy()
        assert np.array_equal(found[row], expected.astype(np.float32))


def four_bits(group: np.ndarray) -> np.ndarray:
    largest = max(group, key=abs)
    scale = (torch.tensor(largest) / -8).to(torch.bfloat16).float().numpy()
    return np.clip(np.rint(group / scale), -8, 7) * scale if scale else group


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_both_layouts_hold_the_same_values_and_say_their_bytes(encoding: Encoding) -> None:
    original = matrix(64, 128)
    bits = {"float32": 32, "int8": 8, "int4": 4.5}.get(encoding, 16)
    expected = 64 * 128 * bits / 8 + (64 * 4 if encoding == "int8" else 0)
    rows = hold(original, encoding, "rows")
    assert rows.shape == (64, 128)
    assert rows.nbytes == expected
    held = make_weight(original, encoding)
    assert held.nbytes == expected
    assert held.layout == ("panels" if linear_cpu.available() else "rows")
    assert torch.equal(decoded(rows), decoded(held))


@settings(max_examples=40)
@given(
    encoding=st.sampled_from(ENCODINGS),
    outputs=st.integers(1, 600),
    tokens=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    add=st.booleans(),
)
def test_the_twin_computes_the_product(
    encoding: Encoding, outputs: int, tokens: int, dtype: torch.dtype, add: bool
) -> None:
    weight = hold(torch.randn(outputs, 64), encoding, "rows")
    x = torch.randn(tokens, 64).to(dtype)
    residual = torch.randn(tokens, outputs).to(dtype) if add else None
    out = linear_torch(x, weight, residual)
    expected = x.double() @ decoded(weight).T + (residual.double() if residual is not None else 0)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, rtol=torch.finfo(dtype).eps * 8, atol=torch.finfo(dtype).eps * 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_dtype_of_x(dtype: torch.dtype) -> None:
    weight = make_weight(matrix(40, 64), "bfloat16")
    x, residual = torch.randn(3, 64).to(dtype), torch.randn(3, 40).to(dtype)
    out = linear(x, weight, residual)
    exact = x.double() @ decoded(weight).T + residual.double()
    assert out.dtype == dtype
    assert torch.allclose(out.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert linear(x[:0], weight).shape == (0, 40)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_x_and_residual_may_be_strided_and_are_not_written(encoding: Encoding) -> None:
    weight = make_weight(matrix(40, 64), encoding)
    wide, tall = torch.randn(5, 128), torch.randn(40, 5)
    before = wide.clone(), tall.clone()
    out = linear(wide[:, ::2], weight, tall.T)
    assert torch.equal(out, linear(wide[:, ::2].contiguous(), weight, tall.T.contiguous()))
    assert torch.equal(wide, before[0])
    assert torch.equal(tall, before[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_spoils_its_own_token_alone(encoding: Encoding, bad: float) -> None:
    weight = make_weight(torch.rand(40, 64) + 0.5, encoding)
    x = torch.randn(30, 64)
    good = linear(x, weight)
    x[17, 3] = bad
    out = linear(x, weight)
    assert not out[17].isfinite().any()
    assert torch.equal(out[:17], good[:17])
    assert torch.equal(out[18:], good[18:])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_largest_sums_fit(encoding: Encoding) -> None:
    """All weights and all activations at the end of their range: no integer overflows."""
    weight = make_weight(torch.full((33, 4096), -8.0), encoding)
    for x in (torch.full((3, 4096), 5.0), torch.full((3, 4096), -5.0)):
        assert torch.allclose(linear(x, weight), x[:, :1] * 4096 * -8.0, rtol=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_and_tiny_numbers_are_no_trouble(encoding: Encoding) -> None:
    weight = make_weight(matrix(40, 64), encoding)
    x = torch.stack((torch.zeros(64), torch.full((64,), 1e-38), torch.full((64,), 1e-45)))
    assert (linear(x, weight).abs() < 1e-30).all()
    assert not linear(torch.randn(2, 64), make_weight(torch.zeros(40, 64), encoding)).any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_embedding_rows(encoding: Encoding) -> None:
    weight = make_weight(matrix(70, 64), encoding)
    everything = decoded(weight)
    ids = torch.tensor([69, 0, 33, 33])
    found = embedding_rows(ids, weight, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, everything[ids].to(torch.bfloat16))
    assert embedding_rows(ids[:0], weight, torch.float32).shape == (0, 64)
    for outside in (-1, 70, 95):
        with pytest.raises(IndexError, match="0 to 69"):
            embedding_rows(torch.tensor([3, outside]), weight, torch.float32)
    with pytest.raises(ValueError, match="ids"):
        embedding_rows(ids.int(), weight, torch.float32)


@pytest.mark.parametrize(
    ("original", "encoding", "message"),
    [
        (torch.zeros(4, 64), "int3", "encoding"),
        (torch.zeros(4, 63), "bfloat16", "multiple of 2"),
        (torch.zeros(4, 48), "int4", "multiple of 32"),
        (torch.zeros(4, 64, dtype=torch.int64), "int8", "floats"),
        (torch.zeros(4, 4, 64), "int8", "matrix"),
        (torch.zeros(0, 64), "int8", "empty"),
        (torch.full((4, 64), float("nan")), "int8", "not finite"),
        (torch.full((4, 64), float("inf")), "int4", "not finite"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(original: Tensor, encoding: Encoding, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_weight(original, encoding)


@pytest.mark.parametrize(
    ("x", "residual", "message"),
    [
        (torch.zeros(3, 63), None, "x must be"),
        (torch.zeros(64), None, "x must be"),
        (torch.zeros(3, 64, dtype=torch.int64), None, "x must be"),
        (torch.zeros(3, 64), torch.zeros(3, 41), "residual"),
        (torch.zeros(3, 64), torch.zeros(2, 40), "residual"),
        (torch.zeros(3, 64), torch.zeros(3, 40, dtype=torch.bfloat16), "residual"),
        (torch.zeros(3, 64, device="meta"), None, "where the weight is"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(x: Tensor, residual: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, make_weight(matrix(40, 64), "int8"), residual)


def run_python(code: str, path: Path = KERNELS) -> tuple[str, str]:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


WITHOUT = """
import logging, torch
logging.basicConfig()
from tolkernels import fast_on_cpu, linear, make_weight
matrix, x = torch.randn(40, 64), torch.randn(3, 64)
for encoding in ("float32", "bfloat16", "int8", "int4"):
    assert fast_on_cpu(encoding) == (encoding == "float32")
    error = linear(x, make_weight(matrix, encoding)) - x @ matrix.T
    assert error.abs().mean() < (2 if encoding == "int4" else 0.1)
"""


def library_of(source: str) -> bytes:
    """A compiled library of some C."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-o", f"{folder}/some.so", "-"]
        subprocess.run(command, input=source, text=True, check=True)
        return Path(f"{folder}/some.so").read_bytes()


@pytest.mark.parametrize("source", ["", "int tk_interface(void) { return -1; }"])
def test_a_library_of_another_version_is_not_called(tmp_path: Path, tool: Callable[[str], str], source: str) -> None:
    """Built before the sources changed, it may lack a function, or take other arguments."""
    tool("cc")
    older = library_of("int tk_isa(void) { return 2; }" + source)
    test_without_the_library_torch_computes_and_the_log_says_so_once(tmp_path, older, "of another version")


@pytest.mark.parametrize(("content", "message"), [(None, "are not built"), (b"no library", "do not load")])
def test_without_the_library_torch_computes_and_the_log_says_so_once(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    shutil.copytree(KERNELS / "tolkernels", tmp_path / "tolkernels", ignore=shutil.ignore_patterns("*.so"))
    if content is not None:
        (tmp_path / "tolkernels" / "_cpu.so").write_bytes(content)
    _, log = run_python(WITHOUT, tmp_path)
    assert log.count(message) == 1


RUNTIMES = """
import os, torch
from tolkernels import linear, make_weight
def threads(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
torch.randn(2000, 2000).sin().sum()  # wakes torch's own pool
before = threads()
linear(torch.randn(8, 1024), make_weight(torch.randn(1024, 1024), "bfloat16"))
libraries = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
print(len(libraries), threads() - before)
"""


@NEEDS_KERNELS
def test_the_kernels_run_on_torchs_own_pool_of_threads() -> None:
    assert run_python(RUNTIMES)[0].split() == ["1", "0"]


def test_the_package_builds_without_a_compiler(tmp_path: Path) -> None:
    root = KERNELS.parent
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(
        root / "server" / "tolserve", tmp_path / "server" / "tolserve", ignore=shutil.ignore_patterns("*.*s*")
    )
    command = [sys.executable, "setup.py", "build"]
    environment = os.environ | {"CC": "/nowhere/cc"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert list((tmp_path / "build").rglob("tolkernels/linear.py"))
    assert not list((tmp_path / "build").rglob("*.[ch]")), "sources are no part of what is installed"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx2" not in Path("/proc/cpuinfo").read_text().split(),
    reason="the kernels are for x86-64 with AVX2",
)
def test_where_there_is_a_compiler_the_kernels_are_there(tool: Callable[[str], str]) -> None:
    tool("cc")
    assert linear_cpu.available(), "run `make setup`, or `python setup.py build_ext --inplace`"
    assert all(fast_on_cpu(encoding) for encoding in ENCODINGS)
