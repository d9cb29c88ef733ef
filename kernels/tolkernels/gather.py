"""Add one layer's rows of the device arena to the residual stream (paper eq. 2.10)."""

import torch
from torch import Tensor

from tolkernels.dispatch import use_triton

BITS = {"bf16": 16, "int8": 8, "int4": 4}


def gather_rows(
    data: Tensor,
    slots: Tensor,
    residual: Tensor,
    *,
    offset: int,
    values: str,
    group_size: int | None,
    factor: Tensor | None = None,
) -> Tensor:
    """residual + the rows of `slots`, as a new tensor [T, d] of the residual's dtype.

    data [slots, stride] uint8 is the device arena, slots [T] int64 each token's slot, residual [T, d] of any float
    dtype; all on one device. A slot's row begins at byte `offset`: d numbers as `values` says ("bf16", "int8", "int4"),
    then for integers a bf16 scale for each `group_size` of them (tolserve.tol.encoding has the bytes). An integer times
    its scale is a float32; it is rounded to the residual's dtype and then added.

    With `factor` [rank, d] of the residual's dtype a row is `rank` numbers, and rows @ factor is added.

    Raises ValueError for shapes, dtypes or a layout that do not fit. A slot out of range is an IndexError in the twin
    and undefined in the kernel, which cannot look: the caller's slots come from a lease.
    """
    _check(data, slots, residual, factor)
    width = residual.shape[1] if factor is None else factor.shape[0]
    _check_layout(data, width, offset, values, group_size)
    if use_triton(data.device):
        from tolkernels.gather_triton import gather_rows_triton as implementation
    else:
        implementation = gather_rows_torch
    return implementation(data, slots, residual, offset=offset, values=values, group_size=group_size, factor=factor)


def gather_rows_torch(
    data: Tensor,
    slots: Tensor,
    residual: Tensor,
    *,
    offset: int,
    values: str,
    group_size: int | None,
    factor: Tensor | None = None,
) -> Tensor:
    """The twin: `gather_rows` in torch, on any device."""
    width = residual.shape[1] if factor is None else factor.shape[0]
    rows = _rows(data[:, offset:], slots, width, values, group_size).to(residual.dtype)
    return residual + rows if factor is None else torch.addmm(residual, rows, factor)


def _rows(data: Tensor, slots: Tensor, width: int, values: str, group_size: int | None) -> Tensor:
    """Rows at the start of data [slots, ...], decoded: [T, width] bfloat16, or float32 where there are scales."""
    end = width * BITS[values] // 8
    found = data[:, :end].index_select(0, slots)
    if group_size is None:
        return found.view(torch.bfloat16)
    if values == "int4":
        found = torch.stack((found & 15, found >> 4), dim=-1).flatten(1)
        integers = (found ^ 8).view(torch.int8) - 8  # 0 to 7, then -8 to -1
    else:
        integers = found.view(torch.int8)
    scales = data[:, end : end + 2 * (width // group_size)].index_select(0, slots).view(torch.bfloat16)
    return (integers.unflatten(1, (-1, group_size)) * scales.float().unsqueeze(-1)).flatten(1)


def _check(data: Tensor, slots: Tensor, residual: Tensor, factor: Tensor | None) -> None:
    if data.ndim != 2 or data.dtype != torch.uint8:
        raise ValueError(f"data must be [slots, stride] uint8, got {list(data.shape)} {data.dtype}")
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [T] int64, got {list(slots.shape)} {slots.dtype}")
    if residual.ndim != 2 or residual.shape[0] != slots.shape[0] or not residual.is_floating_point():
        raise ValueError(
            f"residual must be [{slots.shape[0]}, d] of floats, got {list(residual.shape)} {residual.dtype}"
        )
    if factor is not None and (factor.ndim, factor.shape[-1:], factor.dtype) != (2, residual.shape[1:], residual.dtype):
        raise ValueError(
            f"factor must be [rank, {residual.shape[1]}] {residual.dtype}, got {list(factor.shape)} {factor.dtype}"
        )


def _check_layout(data: Tensor, width: int, offset: int, values: str, group_size: int | None) -> None:
    if values not in BITS or (values == "bf16") != (group_size is None):
        raise ValueError(f"values {values!r} with group_size {group_size} are not known")
    group = 1 if group_size is None else group_size
    if group < 1 or width % group or width * BITS[values] % 16:
        raise ValueError(f"group_size {group_size}: it does not divide rows of {width} values into whole scales")
    size = width * BITS[values] // 8 + (2 * width // group if group_size is not None else 0)
    if offset < 0 or offset % 2 or offset + size > data.shape[1]:
        raise ValueError(f"a row of {size} bytes at offset {offset} does not fit slots of {data.shape[1]} bytes")
