"""How big a tier shall be, in words that people use."""

import re
from fractions import Fraction

_UNITS = {
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{1,3}|%)?")


def _amount_and_unit(text: str) -> tuple[Fraction, str] | None:
    match = _SIZE.fullmatch(text.strip())
    return (Fraction(match[1]), (match[2] or "").lower()) if match else None


def parse_bytes(text: str) -> int:
    """Bytes of `512MiB`, `1GB`, `1.5GiB`: a number and a unit, rounded down. Raises ValueError for anything else."""
    match _amount_and_unit(text):
        case (amount, unit) if unit in _UNITS:
            return int(amount * _UNITS[unit])
    raise ValueError(f"size {text!r} is not understood; say bytes with a unit, such as 512MiB or 2GB")


def parse_cache_size(text: str, record_bytes: int, records: int) -> int:
    """Slots for `text`: records (`12826`), bytes with a unit (`2GiB`, `512MiB`, `1GB`) or a share of the table (`10%`).

    Rounded down, so that a tier never exceeds what was asked for, and at most `records`. Raises ValueError for
    anything else, and for a size above zero that holds no single record.
    """
    match _amount_and_unit(text):
        case (amount, "%") if amount <= 100:
            slots = amount * records / 100
        case (amount, "") if amount.denominator == 1:
            slots = amount
        case (amount, unit) if unit in _UNITS:
            slots = amount * _UNITS[unit] / record_bytes
        case _:
            raise ValueError(
                f"cache size {text!r} is not understood; say records (12826), bytes with a unit (2GiB) or a share of "
                "the table, at most all of it (10%)"
            )
    if 0 < slots < 1:
        raise ValueError(
            f"cache size {text!r} holds no record; one is {record_bytes} bytes and the table has {records} of them"
        )
    return min(int(slots), records)
