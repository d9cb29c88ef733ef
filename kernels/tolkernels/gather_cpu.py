"""`add_rows` and `rms_norm` of `tolkernels.gather` on the CPU through the compiled kernels (cpu/rows.c), in float32.

The sums equal the twin's bit for bit; the norm adds its squares in another order. A token's result depends neither on
the tokens beside it nor on the number of threads.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from tolkernels.cpu import address, compiled, isa
from tolkernels.gather import BITS, add_rows_torch

_CODES = {name: code for code, name in enumerate(BITS)}  # the enum in rows.c


@cache
def _functions() -> ctypes.CDLL:
    lib = compiled()
    pointer, long = ctypes.c_void_p, ctypes.c_long
    lib.tk_add_rows.argtypes = [
        *(pointer, long, long, pointer, long, long),
        *[pointer] * 6,
        *(long, long, long, ctypes.c_float, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ]
    lib.tk_add_rows.restype = long
    lib.tk_rms_norm.argtypes = [*[pointer] * 3, long, long, ctypes.c_float, ctypes.c_int, ctypes.c_int]
    lib.tk_rms_norm.restype = None
    return lib


def add_rows_cpu(
    data: Tensor,
    slots: Tensor,
    stream: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    offset: int,
    values: str,
    group_size: int | None,
    factor: Tensor | None = None,
    host: Tensor | None = None,
    scale: Tensor | None = None,
    level: int | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rows` of a float32 stream; with a factor, which needs a matrix product, the twin's.

    `level` of instructions and `threads` are the machine's and torch's, unless a test asks for others. Raises
    IndexError for a slot out of range.
    """
    if factor is not None:
        return add_rows_torch(
            *(data, slots, stream, norm_weight, eps),
            offset=offset,
            values=values,
            group_size=group_size,
            factor=factor,
            host=host,
            scale=scale,
        )
    stream, slots, norm_weight = stream.contiguous(), slots.contiguous(), norm_weight.contiguous()
    scale = scale.contiguous() if scale is not None else None  # named, so that it outlives the call
    total, normed = torch.empty_like(stream), torch.empty_like(stream)
    wrong = _functions().tk_add_rows(
        *_rows_from(data, offset),
        *((None, 0, 0) if host is None else _rows_from(host, offset)),
        address(slots),
        None if scale is None else address(scale),
        *map(address, (stream, norm_weight, total, normed)),
        *stream.shape,
        group_size or 1,
        eps,
        _CODES[values],
        isa() if level is None else level,
        torch.get_num_threads() if threads is None else threads,
    )
    if wrong >= 0:
        raise IndexError(f"slot {int(slots[wrong])} of token {wrong} is out of range")
    return total, normed


def _rows_from(data: Tensor, offset: int) -> tuple[int, int, int]:
    """Where the row of slot 0 begins, how many slots there are, and the bytes from one to the next."""
    if not data.is_cpu or data.stride(1) != 1:
        raise ValueError(f"rows must lie in RAM, byte after byte, got strides {data.stride()} on {data.device}")
    return data.data_ptr() + offset, data.shape[0], data.stride(0)


def rms_norm_cpu(
    x: Tensor, weight: Tensor, eps: float, *, level: int | None = None, threads: int | None = None
) -> Tensor:
    """`rms_norm` of float32 x; `level` and `threads` as above."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    _functions().tk_rms_norm(
        *map(address, (x, weight, out)),
        *x.shape,
        eps,
        isa() if level is None else level,
        torch.get_num_threads() if threads is None else threads,
    )
    return out
