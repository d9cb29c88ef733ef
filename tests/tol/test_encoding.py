"""What an encoding says of itself, and what it is not believed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tol.reference import encode
from tolserve.settings import EncodingName
from tolserve.tol.encoding import Encoding, EncodingError, values_of

sizes = st.integers(1, 40).map(lambda n: 8 * n)
encodings = st.builds(
    lambda values, group, ranks: Encoding(values, None if values == "bf16" else group, ranks),
    st.sampled_from(["bf16", "int8", "int4"]),
    sizes,
    st.none() | st.lists(st.integers(1, 4000), min_size=1, max_size=30).map(tuple),
)


@given(encodings)
def test_what_is_written_is_read(encoding: Encoding) -> None:
    assert Encoding.parse(encoding.to_json()) == encoding
    assert values_of(encoding.name) == (encoding.values, encoding.ranks is not None)
    assert encoding.name in EncodingName.__args__  # type: ignore[attr-defined]


@pytest.mark.parametrize(("values", "group"), [("bf16", None), ("int8", 8), ("int4", 8), ("int4", 24)])
def test_a_row_has_the_bytes_of_its_values_and_scales(values: Any, group: int | None) -> None:
    for width in (24, 48):
        assert Encoding(values, group).row_bytes(width) == len(encode(np.ones(width, np.float32), values, group))


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "int8",
        {},
        {"name": "int3", "group_size": 64},
        {"name": ["int8"], "group_size": 64},
        {"name": "lowrank-int3", "group_size": 64, "ranks": [4]},
        {"name": "lowrank-bf16", "ranks": [4]},
        {"name": "bf16", "group_size": 64},
        {"name": "bf16", "ranks": [4]},
        {"name": "int8"},
        {"name": "int8", "group_size": None},
        {"name": "int8", "group_size": 64.0},
        {"name": "int8", "group_size": True},
        {"name": "int8", "group_size": 0},
        {"name": "int8", "group_size": -8},
        {"name": "int8", "group_size": 4},
        {"name": "int4", "group_size": 12},
        {"name": "int8", "group_size": 64, "surprise": 1},
        {"name": "lowrank"},
        {"name": "lowrank", "ranks": 7},
        {"name": "lowrank", "ranks": [4.0]},
        {"name": "lowrank", "ranks": [True]},
        {"name": "lowrank", "ranks": [4], "group_size": 8},
        {"name": "lowrank-int8", "ranks": [4]},
    ],
)
def test_a_malformed_encoding_is_refused(raw: Any) -> None:
    with pytest.raises(EncodingError):
        Encoding.parse(raw)


@pytest.mark.parametrize(
    ("encoding", "layers", "hidden_size"),
    [
        (Encoding("int8", 64), 2, 32),
        (Encoding("int8", 64), 2, 96),
        (Encoding(ranks=(4,)), 2, 32),
        (Encoding(ranks=(4, 4, 4)), 2, 32),
        (Encoding(ranks=(4, 33)), 2, 32),
        (Encoding(ranks=(4, 0)), 2, 32),
        (Encoding(ranks=(4, -8)), 2, 32),
        (Encoding("int4", 8, (8, 12)), 2, 32),
    ],
)
def test_an_encoding_that_does_not_fit_a_shape_is_refused(encoding: Encoding, layers: int, hidden_size: int) -> None:
    with pytest.raises(EncodingError):
        encoding.widths(layers, hidden_size)
