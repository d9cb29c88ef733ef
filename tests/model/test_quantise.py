"""Rows to bytes: every bit as the slow reference says, and no value further off than its scale allows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tol.reference import decode, encode, scale_of
from tolkernels import add_rows
from tolserve.model.checkpoint import CheckpointError
from tolserve.model.quantise import encode_rows
from tolserve.tol.encoding import Encoding, Values

ENCODINGS: list[tuple[Values, int | None]] = [("bf16", None), ("int8", 8), ("int8", 16), ("int4", 8), ("int4", 32)]
values_of_rows = st.one_of(
    st.floats(-100, 100, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-42, 1.0, -1.0, 0.5, 127.0, -8.0]),
)


@settings(max_examples=150)
@given(arrays(np.float32, (2, 32), elements=values_of_rows), st.sampled_from(ENCODINGS))
def test_bytes_are_those_of_the_reference_both_ways(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float32]], how: tuple[Values, int | None]
) -> None:
    values, group_size = how
    encoding = Encoding(values, group_size)
    encoded = encode_rows(torch.from_numpy(rows), encoding)
    assert encoded.shape == (2, encoding.row_bytes(32))
    arena = torch.cat((torch.zeros(2, 6, dtype=torch.uint8), encoded), 1)
    stream = torch.zeros(3, 32)
    slots, layout = torch.tensor([1, 0, 1]), {"offset": 6, "values": values, "group_size": group_size}
    found, _ = add_rows(arena, slots, stream, torch.ones(32), 1e-5, **layout)
    for index in range(2):
        data = encode(rows[index], values, group_size)
        assert encoded[index].numpy().tobytes() == data
        decoded = decode(data, 32, values, group_size)
        assert np.array_equal(found[1 - index].numpy(), decoded)
        for start in range(0, 32, group_size or 32):
            group = rows[index, start : start + (group_size or 32)]
            scale = abs(float(scale_of(group, values))) if group_size else np.abs(group) * 2.0**-7
            # The level that two's complement lacks above zero costs int4 up to half a scale more.
            bound = scale * (0.5 if values != "int4" else 1.0) * (1 + 2.0**-6)
            # Below 127 times half of the smallest bf16, 6e-39, a group's scale is zero.
            assert (np.abs(decoded[start : start + len(group)].astype(float) - group) <= bound + 1e-38).all()


def test_what_is_not_finite_is_refused() -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        rows = torch.zeros(2, 8)
        rows[1, 3] = bad
        for values, group_size in (("bf16", None), ("int8", 8), ("int4", 8)):
            with pytest.raises(CheckpointError, match="not finite"):
                encode_rows(rows, Encoding(values, group_size))
