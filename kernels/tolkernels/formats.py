"""What a weight of a linear map may be held as."""

from collections.abc import Sequence
from typing import Literal

import torch

Encoding = Literal["float32", "float16", "bfloat16", "int8", "int4"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INT4_GROUP = 32  # values along K that share a scale; cpu/linear.c's GROUP


def encoded_bytes(shape: Sequence[int], encoding: Encoding) -> int:
    """Bytes of a matrix [N, K] with its scales, without the rows that kernels may pad it with."""
    rows, columns = shape
    if encoding == "int8":
        return rows * (columns + 4)
    if encoding == "int4":
        return rows * (columns // 2 + columns // INT4_GROUP * 2)
    return rows * columns * DTYPES[encoding].itemsize
