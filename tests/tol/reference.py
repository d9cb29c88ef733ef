"""Rows to bytes and back, value by value, after the words of tol/encoding.py."""

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]


def bf16(value: np.float32) -> np.float32:
    """The nearest bf16, ties to even."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def bf16_bytes(value: np.float32) -> bytes:
    return (int(bf16(value).view(np.uint32)) >> 16).to_bytes(2, "little")


def from_bf16_bytes(two: bytes) -> np.float32:
    return np.uint32(int.from_bytes(two, "little") << 16).view(np.float32)


def scale_of(group: Row, values: str) -> np.float32:
    if values == "int8":
        return bf16(np.abs(group).max() / np.float32(127))
    largest = max(group.max(), 0) if group.max() > -group.min() else group.min()
    return bf16(largest / np.float32(-8)) + np.float32(0)  # no -0


def encode(row: Row, values: str, group_size: int | None) -> bytes:
    if group_size is None:
        return b"".join(bf16_bytes(value) for value in row)
    integers: list[int] = []
    scales = b""
    for group in np.split(row, len(row) // group_size):
        scale = scale_of(group, values)
        low, high = (-127, 127) if values == "int8" else (-8, 7)
        for value in group:
            ratio = np.rint(value / (scale or np.float32(1)))
            integers.append(int(min(max(ratio, low), high)))
        scales += bf16_bytes(scale)
    if values == "int8":
        return bytes(n % 256 for n in integers) + scales
    return bytes(integers[i] % 16 + 16 * (integers[i + 1] % 16) for i in range(0, len(row), 2)) + scales


def decode(data: bytes, width: int, values: str, group_size: int | None) -> Row:
    if group_size is None:
        return np.array([from_bf16_bytes(data[2 * i : 2 * i + 2]) for i in range(width)], np.float32)
    end = width if values == "int8" else width // 2
    decoded = []
    for i in range(width):
        if values == "int8":
            integer = data[i] - 256 * (data[i] > 127)
        else:
            integer = data[i // 2] >> 4 if i % 2 else data[i // 2] & 15
            integer -= 16 * (integer > 7)
        at = end + 2 * (i // group_size)
        decoded.append(np.float32(integer) * from_bf16_bytes(data[at : at + 2]))
    return np.array(decoded, np.float32)
