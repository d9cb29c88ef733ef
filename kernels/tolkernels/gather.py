"""Add one layer's rows of the device arena to the residual stream (paper eq. 2.10)."""

import torch
from torch import Tensor

from tolkernels.dispatch import use_triton


def gather_rows(rows: Tensor, slots: Tensor, layer: int, residual: Tensor) -> Tensor:
    """residual + rows[slots, layer], as a new tensor [T, d] of the residual's dtype.

    rows [slots, layers, d] bfloat16 is the device arena, slots [T] int64 each token's slot, residual [T, d] of any
    float dtype; all on one device. A row is converted to the residual's dtype before the addition.

    Raises ValueError for shapes, dtypes or a layer that do not fit. A slot out of range is an IndexError in the twin
    and undefined in the kernel, which cannot look: the caller's slots come from a lease.
    """
    _check(rows, slots, layer, residual)
    if use_triton(rows.device):
        from tolkernels.gather_triton import gather_rows_triton

        return gather_rows_triton(rows, slots, layer, residual)
    return gather_rows_torch(rows, slots, layer, residual)


def gather_rows_torch(rows: Tensor, slots: Tensor, layer: int, residual: Tensor) -> Tensor:
    """The twin: `gather_rows` in torch, on any device."""
    return residual + rows[:, layer].index_select(0, slots).to(residual.dtype)


def _check(rows: Tensor, slots: Tensor, layer: int, residual: Tensor) -> None:
    if rows.ndim != 3 or rows.dtype != torch.bfloat16:
        raise ValueError(f"rows must be [slots, layers, d] bfloat16, got {list(rows.shape)} {rows.dtype}")
    if not 0 <= layer < rows.shape[1]:
        raise ValueError(f"layer {layer} is not among the {rows.shape[1]} of rows")
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [T] int64, got {list(slots.shape)} {slots.dtype}")
    if residual.shape != (slots.shape[0], rows.shape[2]) or not residual.is_floating_point():
        raise ValueError(
            f"residual must be {[slots.shape[0], rows.shape[2]]} of floats, got {list(residual.shape)} {residual.dtype}"
        )
