"""Rows to bytes, as tol/encoding.py describes them."""

import torch
from torch import Tensor

from tolserve.model.checkpoint import CheckpointError
from tolserve.tol.encoding import Encoding


def encode_rows(rows: Tensor, encoding: Encoding) -> Tensor:
    """Rows float32 [n, width] as uint8 [n, row_bytes]. Raises CheckpointError for a value that is not finite.

    bf16 rounds to the nearest, ties to even. For int8 a scale is a group's largest magnitude / 127, for int4 its
    value of largest magnitude / -8, so that this value has the one level more that two's complement has below zero.
    The scale is rounded to bf16 first; a value is then value / scale rounded to the nearest integer, ties to even, and
    clipped to the integer's range. A group of zeros has scale 0. A search for the int4 scale of least squared error
    made the demo model's bits per byte no better, so there is none.
    """
    if not torch.isfinite(rows).all():
        raise CheckpointError("a row has a value that is not finite: the model's weights are damaged or overflow")
    if encoding.group_size is None:
        return rows.to(torch.bfloat16).view(torch.uint8)
    groups = rows.unflatten(1, (-1, encoding.group_size))
    if encoding.values == "int8":
        low, high = -127, 127
        scales = groups.abs().amax(-1) / high
    else:
        low, high = -8, 7
        largest, smallest = groups.amax(-1), groups.amin(-1)
        scales = torch.where(largest > -smallest, largest, smallest) / low
    scales = scales.to(torch.bfloat16) + 0.0  # no -0: which zero is a group's smallest value is not defined
    divisors = torch.where(scales == 0, 1.0, scales.float()).unsqueeze(-1)
    integers = (groups / divisors).round_().clamp_(low, high).to(torch.int8).flatten(1)
    values = integers.view(torch.uint8)
    if encoding.values == "int4":
        values = (values[:, ::2] & 15) | (values[:, 1::2] << 4)
    return torch.cat((values, scales.view(torch.uint8)), 1)
