"""add_rows, rms_norm and lookup_slots against float64, in their torch twins and in their Triton kernels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from closeness import DTYPES, check, in_wider_rows
from tol.reference import decode
from tolkernels import add_rows, lookup_slots, rms_norm
from tolkernels.dispatch import triton_installed, use_triton
from tolkernels.gather import add_rows_torch, lookup_slots_torch, rms_norm_torch

EPS = 1e-5
BYTES = {"bf16": 2, "int8": 1, "int4": 0.5}


@dataclass
class Case:
    """Random rows in an arena and in host memory, a slot for each token, and the stream they are added to."""

    data: Tensor
    host: Tensor | None
    slots: Tensor
    stream: Tensor
    weight: Tensor
    layout: dict[str, Any]
    factor: Tensor | None
    scale: Tensor | None = None

    def run(self, add: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        data, slots, stream, weight = (t.to(device) for t in (self.data, self.slots, self.stream, self.weight))
        factor = None if self.factor is None else self.factor.to(device)
        scale = None if self.scale is None else self.scale.to(device)
        host = self.host.pin_memory() if self.host is not None and device.type == "cuda" else self.host
        return add(data, slots, stream, weight, EPS, **self.layout, factor=factor, host=host, scale=scale)

    def rows(self) -> Tensor:
        """[T, width] float64: what each token's bytes say, decoded one value at a time, times its scale."""
        width = self.stream.shape[1] if self.factor is None else self.factor.shape[0]
        found = []
        for slot in self.slots.tolist():
            record = self.data[slot] if slot >= 0 or self.host is None else self.host[-1 - slot]
            row = record[self.layout["offset"] :].numpy().tobytes()
            found.append(decode(row, width, self.layout["values"], self.layout["group_size"]))
        rows = torch.from_numpy(np.array(found, np.float64).reshape(len(found), width))
        return rows if self.scale is None else rows * self.scale.double().unsqueeze(1)


def random_bytes(records: int, width: int, values: str, group_size: int | None, offset: int) -> Tensor:
    """Records of random integers with ordinary numbers as scales, or of ordinary numbers; two bytes longer than a row
    is, and views with a gap between them."""
    end = offset + int(width * BYTES[values])
    size = end + (2 * width // group_size if group_size else 0)
    whole = torch.randint(256, (records, size + 6), dtype=torch.uint8)
    numbers = whole.view(torch.bfloat16)[:, (end if group_size else offset) // 2 :]
    numbers.copy_(torch.randn(numbers.shape) * (0.1 if group_size else 1))
    return whole[:, : size + 2]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    values = draw(st.sampled_from(list(BYTES)))
    group_size = None if values == "bf16" else draw(st.sampled_from([8, 16, 24, 32, 64]))
    width = draw(st.integers(1, 80)) if group_size is None else group_size * draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    offset, slots, tokens = 2 * draw(st.integers(0, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 6))
    dtype, rank = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    host = random_bytes(3, width, values, group_size, offset) if draw(st.booleans()) else None
    size = draw(st.integers(1, 90)) if rank else width
    return Case(
        data=random_bytes(slots, width, values, group_size, offset),
        host=host,
        slots=torch.randint(-3 if host is not None else 0, slots, (tokens,)),
        stream=in_wider_rows(torch.randn(tokens, size).to(dtype)),
        weight=torch.randn(size),
        layout={"offset": offset, "values": values, "group_size": group_size},
        factor=torch.randn(width, size).to(dtype) if rank else None,
        scale=torch.randn(tokens) * 2 if draw(st.booleans()) else None,
    )


def check_case(case: Case, add: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> None:
    before = [tensor.clone() for tensor in (case.data, case.slots, case.stream)]
    total, normed = case.run(add, device)
    dtype, rows, stream = case.stream.dtype, case.rows(), case.stream.double()
    assert all(tensor.dtype == dtype and tensor.shape == stream.shape for tensor in (total, normed))
    if case.factor is not None:  # coordinates are rounded too, and each product is as large as they are
        factor = case.factor.double()
        check(total, stream + rows @ factor, stream.abs() + rows.abs() @ factor.abs(), dtype, 4)
    else:
        check(total, stream + rows, stream.abs() + 2 * rows.abs(), dtype)
    check_norm(total, normed, case.weight)
    assert all(torch.equal(a, b) for a, b in zip(before, (case.data, case.slots, case.stream), strict=True))


def check_norm(x: Tensor, normed: Tensor, weight: Tensor) -> None:
    exact = x.double().cpu()
    expected = exact / (exact.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double()
    check(normed, expected, expected.abs(), x.dtype, 1.1 if x.dtype != torch.float32 else 32)


@settings(max_examples=60)
@given(cases())
def test_rows_are_added_and_normed(case: Case) -> None:
    check_case(case, add_rows_torch, torch.device("cpu"))


@settings(max_examples=40)
@given(case=cases())
def test_the_kernel_does_the_same(device: torch.device, case: Case) -> None:
    from tolkernels.gather_triton import add_rows_triton

    check_case(case, add_rows_triton, device)


def check_whole_scales(case: Case, add: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> None:
    """1 gives what no scale gives, 0 the stream, bit for bit."""
    plain, ones, zeros = (
        replace(case, scale=scale).run(add, device)
        for scale in (None, torch.ones(len(case.slots)), torch.zeros(len(case.slots)))
    )
    assert all(torch.equal(*pair) for pair in zip(plain, ones, strict=True))
    assert torch.equal(zeros[0].cpu(), case.stream)


@settings(max_examples=30)
@given(case=cases(), add=st.sampled_from([add_rows, add_rows_torch]))
def test_a_scale_of_one_is_none_and_of_zero_no_row(case: Case, add: Callable[..., tuple[Tensor, Tensor]]) -> None:
    check_whole_scales(case, add, torch.device("cpu"))


@settings(max_examples=20)
@given(case=cases())
def test_so_it_is_in_the_kernel(device: torch.device, case: Case) -> None:
    from tolkernels.gather_triton import add_rows_triton

    check_whole_scales(case, add_rows_triton, device)


@pytest.mark.parametrize("values", BYTES)
@pytest.mark.parametrize("width", [960, 2048])
def test_the_kernel_adds_the_papers_rows(device: torch.device, values: str, width: int) -> None:
    """Some through host memory; the stream gets the twin's very bits where Triton rounds as hardware does."""
    from tolkernels.gather_triton import add_rows_triton

    group_size = None if values == "bf16" else 64
    layout = {"offset": 32, "values": values, "group_size": group_size}
    data, host = (random_bytes(n, width, values, group_size, 32) for n in (4, 3))
    stream, slots = torch.randn(3, width, dtype=torch.float16), torch.tensor([3, -3, 0])
    case = Case(data, host, slots, stream, torch.randn(width), layout, None, torch.tensor([0.7, -2.0, 1.0]))
    check_case(case, add_rows_triton, device)
    assert torch.equal(case.run(add_rows_triton, device)[0], case.run(add_rows_torch, device)[0])


def test_a_float32_stream_takes_the_row_unrounded() -> None:
    data = random_bytes(5, 64, "int8", 16, 8)
    layout = {"offset": 8, "values": "int8", "group_size": 16}
    case = Case(data, None, torch.tensor([4, 0, 2]), torch.randn(3, 64), torch.ones(64), layout, None)
    expected = case.stream + case.rows().float()
    for add in (add_rows, add_rows_torch):
        assert torch.equal(case.run(add, torch.device("cpu"))[0], expected)


@settings(max_examples=20)
@given(tokens=st.integers(0, 4), width=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_norms(device: torch.device, tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    from tolkernels.gather_triton import rms_norm_triton

    torch.manual_seed(seed)
    x, weight = in_wider_rows(torch.randn(tokens, width).to(dtype)), torch.randn(width)
    check_norm(x, rms_norm_torch(x, weight, EPS), weight)
    x = x.to(device)
    check_norm(x, rms_norm_triton(x, weight.to(device), EPS), weight)


@settings(max_examples=20)
@given(st.data())
def test_a_token_is_looked_up_on_the_device_then_in_host_memory(device: torch.device, data: st.DataObject) -> None:
    from tolkernels.gather_triton import lookup_slots_triton

    vocabulary = data.draw(st.integers(1, 20))
    token, place = st.integers(0, vocabulary - 1), st.integers(-1, 5)
    tokens = data.draw(st.lists(token, max_size=300))
    slot_map = data.draw(st.lists(place, min_size=vocabulary, max_size=vocabulary))
    host_map = data.draw(st.none() | st.lists(place, min_size=vocabulary, max_size=vocabulary))
    slots = [
        slot_map[t] if slot_map[t] >= 0 else 0 if host_map is None or host_map[t] < 0 else -1 - host_map[t]
        for t in tokens
    ]
    missed = [slot_map[t] < 0 and (host_map is None or host_map[t] < 0) for t in tokens]
    for lookup, where in (
        (lookup_slots, torch.device("cpu")),
        (lookup_slots_torch, device),
        (lookup_slots_triton, device),
    ):
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        records = None if host_map is None else torch.tensor(host_map, dtype=dtype, device=where)
        ids = torch.tensor(tokens, dtype=torch.int64, device=where)
        found = lookup(ids, torch.tensor(slot_map, dtype=dtype, device=where), records)
        assert [tensor.tolist() for tensor in found] == [slots, missed]
        assert [tensor.dtype for tensor in found] == [torch.int64, torch.bool]


def good() -> dict[str, Any]:
    return {
        "data": random_bytes(4, 8, "bf16", None, 16),
        "slots": torch.tensor([0, 1, 2]),
        "stream": torch.zeros(3, 8),
        "norm_weight": torch.ones(8),
        "eps": EPS,
        "offset": 16,
        "values": "bf16",
        "group_size": None,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", torch.zeros(4, 32)),
        ("data", torch.zeros(4, 2, 8, dtype=torch.uint8)),
        ("slots", torch.zeros(3, dtype=torch.int32)),
        ("slots", torch.zeros(3, 1, dtype=torch.int64)),
        ("offset", 20),
        ("offset", 15),
        ("offset", -2),
        ("offset", 0x7FFFFFFF),
        ("values", "int3"),
        ("group_size", 8),
        ("factor", torch.zeros(8, 9)),
        ("factor", torch.zeros(8, 8, dtype=torch.bfloat16)),
        ("factor", torch.zeros(8)),
        ("stream", torch.zeros(2, 8)),
        ("stream", torch.zeros(3, 8, dtype=torch.int64)),
        ("norm_weight", torch.ones(7)),
        ("norm_weight", torch.ones(8, dtype=torch.bfloat16)),
        ("scale", torch.ones(2)),
        ("scale", torch.ones(3, dtype=torch.float64)),
        ("host", torch.zeros(4, 64)),
        ("host", torch.zeros(4, 30, dtype=torch.uint8)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: object) -> None:
    message = {"norm_weight": "norm's weight"}.get(name, "offset" if name == "host" and value.shape[1] == 30 else name)
    with pytest.raises(ValueError, match=message):
        add_rows(**good() | {name: value})


@pytest.mark.parametrize("group_size", [None, 0, -8, 3, 16])
def test_scales_that_do_not_divide_a_row_are_refused(group_size: int | None) -> None:
    with pytest.raises(ValueError, match="group_size"):
        add_rows(**good() | {"values": "int8", "group_size": group_size})


@pytest.mark.parametrize(("values", "size"), [("bf16", 24), ("int8", 14), ("int4", 8)])
def test_a_row_ends_within_its_slot(values: str, size: int) -> None:
    """12 values: 24 bytes; 12 and a scale; 6 and a scale."""
    case = good() | {"stream": torch.zeros(3, 12), "norm_weight": torch.ones(12), "offset": 2}
    case |= {"values": values, "group_size": None if values == "bf16" else 12}
    add_rows(**case | {"data": torch.zeros(4, 2 + size, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="does not fit"):
        add_rows(**case | {"data": torch.zeros(4, 1 + size, dtype=torch.uint8)})


@pytest.mark.parametrize("slot", [4, -1])
def test_a_slot_out_of_range_is_an_error_in_the_twin(slot: int) -> None:
    with pytest.raises(IndexError):
        add_rows_torch(**good() | {"slots": torch.tensor([0, 1, slot])})


def test_norms_and_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="norm"):
        rms_norm(torch.zeros(3), torch.ones(3), EPS)
    assert rms_norm(torch.zeros(2, 3), torch.ones(3), EPS).eq(0).all()
    ids, places = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    for tokens, slot_map, host_map in (
        (ids.int(), places, None),
        (ids, places.short(), None),
        (ids, places, ids[None]),
    ):
        with pytest.raises(ValueError, match="must be"):
            lookup_slots(tokens, slot_map, host_map)


def test_the_cpu_does_not_take_triton() -> None:
    assert not use_triton(torch.device("cpu"))
    assert use_triton(torch.device("cuda")) == triton_installed()
