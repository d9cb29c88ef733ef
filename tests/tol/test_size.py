"""Sizes in words."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tolserve.tol.size import parse_bytes, parse_cache_size

V, RECORD = 128_256, 98_304


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("0", 0),
        ("0%", 0),
        ("0GiB", 0),
        ("1", 1),
        ("12826", 12826),
        ("10%", 12825),
        ("100%", V),
        ("3.2%", 4104),
        ("2GiB", 21845),
        ("512MiB", 5461),
        ("1GB", 10172),
        ("1.5 gib", 16384),
        (" 98304B ", 1),
        ("98kb", None),
        ("1TiB", V),
        ("999999", V),
        ("0.0001%", None),
    ],
)
def test_sizes(text: str, slots: int | None) -> None:
    if slots is None:
        with pytest.raises(ValueError, match="holds no record"):
            parse_cache_size(text, RECORD, V)
    else:
        assert parse_cache_size(text, RECORD, V) == slots


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "-5%",
        "+3",
        "nan",
        "NaN%",
        "inf",
        "1e3",
        "100.1%",
        "101%",
        "1.5",
        "ten",
        "10 %%",
        "5 xb",
        "1,000",
        "٣",
        "9" * 99,
    ],
)
def test_anything_else_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"12826.*2GiB.*10%"):
        parse_cache_size(text, RECORD, V)


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["B", "KiB", "MB", "%"]))
def test_a_tier_never_exceeds_what_was_asked_for(amount: int, record_bytes: int, records: int, unit: str) -> None:
    asked = (
        Fraction(amount * records, 100)
        if unit == "%"
        else Fraction(amount * {"B": 1, "KiB": 1024, "MB": 10**6}[unit], record_bytes)
    )
    try:
        slots = parse_cache_size(f"{amount}{unit}", record_bytes, records)
    except ValueError:
        assert 0 < asked < 1 or (unit == "%" and amount > 100)
    else:
        assert slots == min(records, asked.numerator // asked.denominator)


@pytest.mark.parametrize(("text", "size"), [("1GiB", 2**30), ("1.5kB", 1500), ("7b", 7), ("0MB", 0)])
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "12", "10%", "-1GB", "GiB", "1 GiBs"])
def test_bytes_need_a_unit(text: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        parse_bytes(text)
