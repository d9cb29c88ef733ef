"""`tolkernels.linear` on the CPU through the compiled kernels: weights in panels of 32 outputs (cpu/linear.c).

    float32, float16   data [P, K, 32]
    bfloat16, int8     data [P, K/2, 32, 2]; int8 has scales [N] float32
    int4               data [P, K/8, 32] int32, each eight values + 8, from the lowest bits on those of k = 0 2 4 6 1 3
                       5 7; scales [P, K/32, 32] bfloat16

P is N / 32, rounded up; the padding is zero.
"""

import contextlib
import ctypes
import math
import mmap
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tolkernels.cpu import compiled, isa, library
from tolkernels.formats import DTYPES, INT4_GROUP

PANEL = 32
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the k, modulo 8, of a lane's values from the lowest bits on
_DTYPES = DTYPES | {"int8": torch.int8, "int4": torch.int32}
# Products in a call below which a second thread does not help: at 65,000 one takes 2.5 us of a call's 9, and waking a
# sleeping thread takes longer.
_ALONE = 1 << 18
_CODES = {name: code for code, name in enumerate(_DTYPES)}  # the enum in linear.c


def available() -> bool:
    return library() is not None


@cache
def _functions() -> ctypes.CDLL:
    lib = compiled()
    lib.tk_linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 3 + [ctypes.c_int] * 3
    lib.tk_linear.restype = ctypes.c_int
    lib.tk_linear_argmax.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_long] * 3 + [ctypes.c_int] * 3
    lib.tk_linear_argmax.restype = ctypes.c_int
    return lib


def empty(outputs: int, inputs: int, encoding: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Room for a weight [outputs, inputs]: its data and scales."""
    panels = -(-outputs // PANEL)
    shape = {"bfloat16": (inputs // 2, PANEL, 2), "int8": (inputs // 2, PANEL, 2), "int4": (inputs // 8, PANEL)}
    data = _huge_pages((panels, *shape.get(encoding, (inputs, PANEL))), _DTYPES[encoding])
    if encoding == "int8":
        return data, torch.empty(outputs, device=device)
    if encoding == "int4":
        return data, torch.empty(panels, inputs // INT4_GROUP, PANEL, dtype=torch.bfloat16, device=device)
    return data, None


def _huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Fresh memory, in pages of 2 MiB where the system has them: from small ones a core read a tenth more slowly.

    Not torch.empty: what its allocator hands out may have been touched already, in small pages.
    """
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def fill(
    data: Tensor, scales: Tensor | None, start: int, values: Tensor, factors: Tensor | None, encoding: str
) -> None:
    """Put rows `values` [n, K] from row `start` on, a multiple of 32, into panels; n is one too unless they are last.

    int4's values are int8, one to a byte; `factors` are their scales [n, K/32], or [n] for int8.
    """
    count = len(values)
    panels = slice(start // PANEL, -(-(start + count) // PANEL))
    missing = -count % PANEL
    values = F.pad(values, (0, 0, 0, missing)).unflatten(0, (-1, PANEL))  # [p, 32, K]
    if encoding in ("bfloat16", "int8"):
        data[panels] = values.unflatten(2, (-1, 2)).transpose(1, 2)
    elif encoding == "int4":
        lanes = torch.zeros(data[panels].shape, dtype=torch.int32)
        for place, k in enumerate(_NIBBLES):
            lanes |= (values[..., k::8].transpose(1, 2).to(torch.int32) + 8) << 4 * place
        data[panels] = lanes
    else:
        data[panels] = values.transpose(1, 2)
    if scales is None or factors is None:
        return
    if encoding == "int8":
        scales[start : start + count] = factors
    else:
        scales[panels] = F.pad(factors, (0, 0, 0, missing)).unflatten(0, (-1, PANEL)).mT


def rows(ids: Tensor, data: Tensor, scales: Tensor | None, encoding: str) -> tuple[Tensor, Tensor | None]:
    """Values [T, K] and scales of rows `ids`, as `fill` took them."""
    panel, lane = ids // PANEL, ids % PANEL
    values = data[panel, :, lane].flatten(1)
    if scales is None:
        return values, None
    if encoding == "int8":
        return values, scales[ids]
    shifts = torch.tensor([4 * _NIBBLES.index(k) for k in range(8)], dtype=torch.int32)
    nibbles = (values.unsqueeze(2) >> shifts) & 15
    return (nibbles - 8).flatten(1).to(torch.int8), scales[panel, :, lane]


def linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    encoding: str,
    outputs: int,
    residual: Tensor | None,
    *,
    level: int | None = None,
    threads: int | None = None,
) -> Tensor:
    """x [T, K] float32 times a weight of `outputs` rows, plus residual [T, outputs] float32.

    `level` of instructions and `threads` are the machine's and torch's, unless a test asks for others.
    """
    x = x.contiguous()
    residual = residual.contiguous() if residual is not None else None
    out = torch.empty(len(x), outputs)
    failed = _functions().tk_linear(
        *_addresses(x, data, scales, encoding),
        residual.data_ptr() if residual is not None else None,
        out.data_ptr(),
        *_numbers(x, encoding, outputs, level, threads),
    )
    _check(failed, x)
    return out


def argmax(
    x: Tensor,
    data: Tensor,
    scales: Tensor | None,
    encoding: str,
    outputs: int,
    *,
    level: int | None = None,
    threads: int | None = None,
) -> Tensor:
    """The largest output of each token: [T] int64. What it compares are the bits that `linear` gives."""
    x = x.contiguous()
    best = torch.empty(len(x), dtype=torch.int64)
    failed = _functions().tk_linear_argmax(
        *_addresses(x, data, scales, encoding), best.data_ptr(), *_numbers(x, encoding, outputs, level, threads)
    )
    _check(failed, x)
    return best


def _addresses(x: Tensor, data: Tensor, scales: Tensor | None, encoding: str) -> tuple[int | None, ...]:
    """Of the weight, a group's scales, a row's scales, and x."""
    where = scales.data_ptr() if scales is not None else None
    groups, rows = (where, None) if encoding == "int4" else (None, where)
    return data.data_ptr(), groups, rows, x.data_ptr()


def _numbers(x: Tensor, encoding: str, outputs: int, level: int | None, threads: int | None) -> tuple[int, ...]:
    tokens, inputs = x.shape
    if threads is None:
        threads = torch.get_num_threads() if tokens * outputs * inputs > _ALONE else 1
    return tokens, outputs, inputs, _CODES[encoding], isa() if level is None else level, threads


def _check(failed: int, x: Tensor) -> None:
    if failed:
        raise MemoryError(f"no memory for the {len(x)} tokens of a linear map")
