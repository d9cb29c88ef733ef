"""Add one layer's rows of the device arena to the residual stream (paper eq. 2.10)."""

import torch
from torch import Tensor

from tolkernels.dispatch import use_triton


def gather_rows(
    data: Tensor, slots: Tensor, residual: Tensor, *, offset: int, values: str, group_size: int | None
) -> Tensor:
    """residual + the rows of `slots`, as a new tensor [T, d] of the residual's dtype.

    data [slots, stride] uint8 is the device arena, slots [T] int64 each token's slot, residual [T, d] of any float
    dtype; all on one device. A slot's row begins at byte `offset`, encoded as `values` and `group_size` say
    (tolserve.tol.encoding.RowLayout). It is converted to the residual's dtype before the addition.

    Raises ValueError for shapes, dtypes or a layout that do not fit. A slot out of range is an IndexError in the twin
    and undefined in the kernel, which cannot look: the caller's slots come from a lease.
    """
    _check(data, slots, residual, offset, values, group_size)
    if use_triton(data.device):
        from tolkernels.gather_triton import gather_rows_triton

        return gather_rows_triton(data, slots, residual, offset=offset, values=values, group_size=group_size)
    return gather_rows_torch(data, slots, residual, offset=offset, values=values, group_size=group_size)


def gather_rows_torch(
    data: Tensor, slots: Tensor, residual: Tensor, *, offset: int, values: str, group_size: int | None
) -> Tensor:
    """The twin: `gather_rows` in torch, on any device."""
    rows = data[:, offset : offset + 2 * residual.shape[1]].view(torch.bfloat16)
    return residual + rows.index_select(0, slots).to(residual.dtype)


def _check(data: Tensor, slots: Tensor, residual: Tensor, offset: int, values: str, group_size: int | None) -> None:
    if data.ndim != 2 or data.dtype != torch.uint8:
        raise ValueError(f"data must be [slots, stride] uint8, got {list(data.shape)} {data.dtype}")
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [T] int64, got {list(slots.shape)} {slots.dtype}")
    if residual.ndim != 2 or residual.shape[0] != slots.shape[0] or not residual.is_floating_point():
        raise ValueError(
            f"residual must be [{slots.shape[0]}, d] of floats, got {list(residual.shape)} {residual.dtype}"
        )
    if values != "bf16" or group_size is not None:
        raise ValueError(f"values {values!r} with group size {group_size} are not known")
    if offset < 0 or offset % 2 or offset + 2 * residual.shape[1] > data.shape[1]:
        raise ValueError(f"a row of {residual.shape[1]} values at offset {offset} does not fit {data.shape[1]} bytes")
