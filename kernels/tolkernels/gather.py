"""A layer's rows added to the stream, with the norm that follows in the same pass (paper eq. 2.10).

A row lies in the device arena, or in a record in host memory that is read in place. `lookup_slots` tells which.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tolkernels.dispatch import use_compiled, use_triton

BITS = {"bf16": 16, "int8": 8, "int4": 4}


def add_rows(
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
) -> tuple[Tensor, Tensor]:
    """(stream + each token's row, RMSNorm of that sum times norm_weight): new tensors [T, d] of the stream's dtype.

    data [slots, stride] uint8 is the device arena, slots [T] int64, stream [T, d] of any float dtype, norm_weight [d]
    float32. A slot s >= 0 is a place in the arena; s < 0 is record -1 - s of `host` [n, stride] uint8, which lies in
    RAM and is read where it lies: pinned where the rest is on CUDA. A row begins at byte `offset` of either (a view
    host[:, n:] fits whole records to an arena that holds their bytes from n on): d numbers as `values` says ("bf16",
    "int8", "int4"), then for integers a bf16 scale for each `group_size` of them (tolserve.tol.encoding has the bytes).
    An integer times its scale is a float32. It is rounded to the stream's dtype and then added; the norm is of the
    rounded sum, in float32.

    With `factor` [rank, d] of the stream's dtype a row is `rank` numbers, and rows @ factor is added.

    With `scale` [T] float32 each token's row, or its `rank` numbers, is first multiplied by its number, in float32. 1
    gives what no scale gives, bit for bit, and 0 leaves the stream as it is, since rows are finite.

    Raises ValueError for shapes, dtypes or a layout that do not fit. A slot out of range is an IndexError on the CPU
    and undefined on CUDA, where nobody can look: slots come from a lease or from `lookup_slots`.
    """
    _check(data, slots, stream, factor, scale)
    _check_norm(stream, norm_weight)
    if host is not None and (host.ndim != 2 or host.dtype != torch.uint8 or host.device.type != "cpu"):
        raise ValueError(f"host must be [records, stride] uint8 in RAM, got {list(host.shape)} {host.dtype}")
    width = stream.shape[1] if factor is None else factor.shape[0]
    _check_layout(data, width, offset, values, group_size)
    if host is not None:
        _check_layout(host, width, offset, values, group_size)
    if use_triton(stream.device):
        from tolkernels.gather_triton import add_rows_triton as implementation
    elif use_compiled(stream):
        from tolkernels.gather_cpu import add_rows_cpu as implementation
    else:
        implementation = add_rows_torch
    return implementation(
        data,
        slots,
        stream,
        norm_weight,
        eps,
        offset=offset,
        values=values,
        group_size=group_size,
        factor=factor,
        host=host,
        scale=scale,
    )


def add_rows_torch(
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
) -> tuple[Tensor, Tensor]:
    """The twin: `add_rows` in torch, on any device."""
    width = stream.shape[1] if factor is None else factor.shape[0]
    inside = slots if host is None else slots.clamp(min=0)
    rows = _rows(data[:, offset:], inside, width, values, group_size)
    if host is not None:
        places = (-1 - slots).clamp(min=0).cpu()
        in_place = _rows(host[:, offset:], places, width, values, group_size).to(rows.device)
        rows = torch.where((slots < 0).unsqueeze(1), in_place, rows)
    if scale is not None:
        rows = rows.float() * scale.unsqueeze(1)
    rows = rows.to(stream.dtype)
    total = stream + rows if factor is None else torch.addmm(stream, rows, factor)
    return total, rms_norm_torch(total, norm_weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x squared) + eps) * weight over the last dimension, in float32, as a new tensor like x.

    x [T, d] of any float dtype, weight [d] float32. Raises ValueError for others.
    """
    _check_norm(x, weight)
    if use_triton(x.device):
        from tolkernels.gather_triton import rms_norm_triton as implementation
    elif use_compiled(x):
        from tolkernels.gather_cpu import rms_norm_cpu as implementation
    else:
        implementation = rms_norm_torch
    return implementation(x, weight, eps)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The twin: `rms_norm` in torch, on any device."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def lookup_slots(tokens: Tensor, slot_map: Tensor, host_map: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where each token's row lies, as `add_rows` takes it: (slots [T] int64, missed [T] bool).

    tokens [T] int64; slot_map [V] int32 or int64, a token's slot in the arena or -1; host_map likewise, its record in
    host memory or -1. A token in neither is missed: it gets slot 0, and whoever asked throws its result away. All are
    on one device, and nothing waits for the host.

    Raises ValueError for other shapes and dtypes. A token outside the maps is an IndexError in the twin and undefined
    in the kernel.
    """
    for name, places in (("slot_map", slot_map), ("host_map", host_map)):
        if places is not None and (places.ndim != 1 or places.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"{name} must be [V] int32 or int64, got {list(places.shape)} {places.dtype}")
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be [T] int64, got {list(tokens.shape)} {tokens.dtype}")
    if use_triton(tokens.device):
        from tolkernels.gather_triton import lookup_slots_triton as implementation
    else:
        implementation = lookup_slots_torch
    return implementation(tokens, slot_map, host_map)


def lookup_slots_torch(tokens: Tensor, slot_map: Tensor, host_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """The twin: `lookup_slots` in torch, on any device."""
    slots = slot_map.index_select(0, tokens).long()
    missed = slots < 0
    if host_map is not None:
        records = host_map.index_select(0, tokens).long()
        slots = torch.where(missed, -1 - records, slots)
        missed &= records < 0
    return slots.masked_fill(missed, 0), missed


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


def _check(data: Tensor, slots: Tensor, stream: Tensor, factor: Tensor | None, scale: Tensor | None) -> None:
    if data.ndim != 2 or data.dtype != torch.uint8:
        raise ValueError(f"data must be [slots, stride] uint8, got {list(data.shape)} {data.dtype}")
    if slots.ndim != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [T] int64, got {list(slots.shape)} {slots.dtype}")
    if stream.ndim != 2 or stream.shape[0] != slots.shape[0] or not stream.is_floating_point():
        raise ValueError(f"stream must be [{slots.shape[0]}, d] of floats, got {list(stream.shape)} {stream.dtype}")
    if factor is not None and (factor.ndim, factor.shape[-1:], factor.dtype) != (2, stream.shape[1:], stream.dtype):
        raise ValueError(
            f"factor must be [rank, {stream.shape[1]}] {stream.dtype}, got {list(factor.shape)} {factor.dtype}"
        )
    if scale is not None and (scale.shape != slots.shape or scale.dtype != torch.float32):
        raise ValueError(f"scale must be [{slots.shape[0]}] float32, got {list(scale.shape)} {scale.dtype}")


def _check_norm(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"a norm is of [T, d] floats, got {list(x.shape)} {x.dtype}")
    if weight.shape != x.shape[1:] or weight.dtype != torch.float32:
        raise ValueError(f"a norm's weight must be [{x.shape[1]}] float32, got {list(weight.shape)} {weight.dtype}")


def _check_layout(data: Tensor, width: int, offset: int, values: str, group_size: int | None) -> None:
    if values not in BITS or (values == "bf16") != (group_size is None):
        raise ValueError(f"values {values!r} with group_size {group_size} are not known")
    group = 1 if group_size is None else group_size
    if group < 1 or width % group or width * BITS[values] % 16:
        raise ValueError(f"group_size {group_size}: it does not divide rows of {width} values into whole scales")
    size = width * BITS[values] // 8 + (2 * width // group if group_size is not None else 0)
    if offset < 0 or offset % 2 or offset + size > data.shape[1]:
        raise ValueError(f"a row of {size} bytes at offset {offset} does not fit slots of {data.shape[1]} bytes")
