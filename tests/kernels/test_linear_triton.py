"""Linear maps with quantised weights in their Triton kernels, against float64."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import DTYPES, check, in_wider_rows
from tolkernels import INT4_GROUP


def random_weight(outputs: int, inputs: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values and scales as the kernels take them, the same matrix as float64 [outputs, inputs])."""
    if bits == 8:
        values, scales = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs) * 0.01
        return values, scales, values.double() * scales.double()[:, None]
    values = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8)
    scales = (torch.randn(outputs, inputs // INT4_GROUP) * 0.1).to(torch.bfloat16)
    matrix = torch.empty(outputs, inputs, dtype=torch.float64)
    for place in range(inputs):
        half = (values[:, place // 2] >> 4 * (place % 2)).int() & 15
        matrix[:, place] = (half - 16 * (half > 7)) * scales[:, place // INT4_GROUP].double()
    return values, scales, matrix


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(bits, outputs, inputs): widths that fill no tile, one tile, and more than one."""
    bits = draw(st.sampled_from([8, 4]))
    inputs = draw(st.sampled_from([2, 30, 150, 1000, 1030]) if bits == 8 else st.sampled_from([32, 160, 1024, 1120]))
    return bits, draw(st.integers(1, 37)), inputs


@settings(max_examples=60)
@given(
    shape=shapes(),
    tokens=st.sampled_from([0, 1, 1, 2, 5, 16, 17, 64, 65, 80]),
    dtype=st.sampled_from(DTYPES),
    add=st.booleans(),
    seed=st.integers(0, 999),
)
def test_products_are_those_of_the_decoded_matrix(
    device: torch.device, shape: tuple[int, int, int], tokens: int, dtype: torch.dtype, add: bool, seed: int
) -> None:
    from tolkernels.linear_triton import MAX_TOKENS, quantised_linear

    # Triton's interpreter multiplies bfloat16 tiles as if their bits were integers.
    assume(device.type == "cuda" or dtype != torch.bfloat16 or not 1 < tokens <= MAX_TOKENS)
    torch.manual_seed(seed)
    bits, outputs, inputs = shape
    values, scales, matrix = random_weight(outputs, inputs, bits)
    x = in_wider_rows(torch.randn(tokens, inputs).to(dtype))
    residual = in_wider_rows(torch.randn(tokens, outputs).to(dtype)) if add else None
    moved = (t.to(device) if t is not None else None for t in (x, values, scales, residual))
    found = quantised_linear(*moved)
    assert (found.shape, found.dtype) == ((tokens, outputs), dtype)
    old = residual.double() if residual is not None else torch.zeros(tokens, outputs, dtype=torch.float64)
    size = x.double().abs() @ matrix.abs().T + old.abs()
    # A rounding of the result; of each weight, where several tokens share it; of float32's sums.
    check(found, x.double() @ matrix.T + old, size, dtype, 2 if dtype != torch.float32 else 16)


@settings(max_examples=20)
@given(
    outputs=st.integers(1, 9), inputs=st.sampled_from([2, 1000, 1030]), dtype=st.sampled_from(DTYPES), add=st.booleans()
)
def test_one_token_times_a_matrix_of_its_own_precision(
    device: torch.device, outputs: int, inputs: int, dtype: torch.dtype, add: bool
) -> None:
    from tolkernels.linear_triton import vector_linear

    x, matrix = torch.randn(1, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    residual = torch.randn(1, outputs).to(dtype) * add
    found = vector_linear(x.to(device), matrix.to(device), None, residual.to(device) if add else None)
    assert found.dtype == dtype
    size = x.double().abs() @ matrix.double().abs().T + residual.double().abs()
    check(found, x.double() @ matrix.double().T + residual.double(), size, dtype, 1.1 if dtype != torch.float32 else 16)


@settings(max_examples=30)
@given(shape=shapes(), dtype=st.sampled_from(DTYPES), data=st.data(), seed=st.integers(0, 999))
def test_rows_are_those_of_the_decoded_matrix(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, data: st.DataObject, seed: int
) -> None:
    from tolkernels.linear_triton import quantised_rows

    torch.manual_seed(seed)
    bits, outputs, inputs = shape
    values, scales, matrix = random_weight(outputs, inputs, bits)
    ids = data.draw(st.none() | st.lists(st.integers(0, outputs - 1), max_size=5))
    picked = torch.tensor(ids, dtype=torch.int64, device=device) if ids is not None else None
    found = quantised_rows(values.to(device), scales.to(device), dtype, picked)
    expected = matrix if ids is None else matrix[ids]
    assert found.dtype == dtype
    check(found, expected, expected.abs(), dtype, 1.01)


@pytest.mark.parametrize("tokens", [1, 2])
def test_what_is_not_a_number_shows_in_its_own_token_alone(device: torch.device, tokens: int) -> None:
    from tolkernels.linear_triton import quantised_linear

    values, scales, _ = (tensor.to(device) for tensor in random_weight(5, 64, 8))
    x = torch.randn(tokens, 64, device=device)
    x[0, 3] = torch.nan
    found = quantised_linear(x, values, scales, None)
    assert found[0].isnan().all()
    assert not found[1:].isnan().any()


def test_a_piece_ends_where_the_next_begins(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from tolkernels import linear_triton

    values, scales, matrix = random_weight(37, 64, 4)
    x, residual = torch.randn(70, 64), torch.randn(70, 37)
    monkeypatch.setattr(linear_triton, "PIECE_BYTES", 10 * 64 * 4)
    found = linear_triton.quantised_linear(*(t.to(device) for t in (x, values, scales, residual)))
    size = x.double().abs() @ matrix.abs().T + residual.double().abs()
    check(found, x.double() @ matrix.T + residual.double(), size, torch.float32, 16)
