"""The Triton kernels of `tolkernels.gather`; import it only where Triton is installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tolkernels.gather import BITS

# Rows and scales are loaded as integers, so that what was masked out is 0 and two loads can be put together with "or".
_LOADED_AS = {"bf16": torch.int16, "int8": torch.int8, "int4": torch.uint8}
# A row is one program's, so that the norm is in the same pass: at 2,048 values 16 a thread, two 16-byte loads of bf16.
VALUES_PER_WARP = 512


@triton.jit
def _load(arena, arena_stride, host, host_stride, slot, columns, count, in_host: tl.constexpr):
    """The first `count` columns of a slot's row in the arena, or, for slot < 0, of a record in host memory; 0 beyond.

    One of the two loads is masked out as a whole, which costs nothing; a chosen pointer would cost their width, as the
    compiler then knows nothing of its alignment.
    """
    found = tl.load(arena + slot * arena_stride + columns, mask=columns < tl.where(slot >= 0, count, 0), other=0)
    if in_host:
        inside = columns < tl.where(slot < 0, count, 0)
        found |= tl.load(host + (-1 - slot) * host_stride + columns, mask=inside, other=0)
    return found


@triton.jit
def _decoded_row(
    slot,
    rows,  # row of slot 0: int16 (bf16), int8, or uint8 with two values each
    scales,  # its scales: int16 (bf16)
    host_rows,  # the same of record 0 in host memory
    host_scales,
    row_stride,  # from slot to slot, in elements of rows
    scale_stride,
    host_row_stride,
    host_scale_stride,
    width,
    bits: tl.constexpr,
    group: tl.constexpr,
    in_host: tl.constexpr,
    pieces: tl.constexpr,
    chunk: tl.constexpr,
):
    """A row as float32 [pieces, chunk]. A piece lies within a group, so that it has one scale."""
    loaded: tl.constexpr = chunk // 2 if bits == 4 else chunk  # elements of a piece
    held = width // 2 if bits == 4 else width
    piece = tl.arange(0, pieces)
    columns = piece[:, None] * loaded + tl.arange(0, loaded)[None, :]
    raw = _load(rows, row_stride, host_rows, host_row_stride, slot, columns, held, in_host)
    if bits == 16:
        return raw.to(tl.bfloat16, bitcast=True).to(tl.float32)
    if bits == 4:
        raw = raw.to(tl.int32)
        value = tl.interleave(((raw & 15) ^ 8) - 8, ((raw >> 4) ^ 8) - 8).to(tl.float32)
    else:
        value = raw.to(tl.float32)
    of_group = piece * chunk // group
    scale = _load(scales, scale_stride, host_scales, host_scale_stride, slot, of_group, width // group, in_host)
    return value * scale.to(tl.bfloat16, bitcast=True).to(tl.float32)[:, None]


@triton.jit
def _norm(x, weight, columns, width, eps):
    """RMSNorm of the one row x, float32 and 0 outside `width`."""
    scale = 1 / tl.sqrt(tl.sum(x * x) / width + eps)
    return x * scale * tl.load(weight + columns, mask=columns < width, other=0)


@triton.jit(do_not_specialize_on_alignment=["slots", "scale"])
def _add_rows_kernel(
    slots, rows, scales, host_rows, host_scales,
    row_stride, scale_stride, host_row_stride, host_scale_stride,
    scale, stream, weight, eps, total, normed,  # stream with a stride; total and normed [T, width], contiguous
    stream_stride, width, scaled: tl.constexpr,
    bits: tl.constexpr, group: tl.constexpr, in_host: tl.constexpr, pieces: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """total = stream + row and normed = its norm, for one token a program."""
    token = tl.program_id(0).to(tl.int64)
    row = _decoded_row(
        tl.load(slots + token), rows, scales, host_rows, host_scales,
        row_stride, scale_stride, host_row_stride, host_scale_stride,
        width, bits, group, in_host, pieces, chunk,
    )  # fmt: skip
    if scaled:
        row *= tl.load(scale + token)
    columns = tl.arange(0, pieces)[:, None] * chunk + tl.arange(0, chunk)[None, :]
    inside = columns < width
    # A row is rounded to the stream's dtype first, as in torch; float32 in between is what torch does for 16-bit sums.
    dtype = total.dtype.element_ty
    old = tl.load(stream + token * stream_stride + columns, mask=inside, other=0)
    new = (old.to(tl.float32) + row.to(dtype).to(tl.float32)).to(dtype)
    tl.store(total + token * width + columns, new, mask=inside)
    tl.store(normed + token * width + columns, _norm(new.to(tl.float32), weight, columns, width, eps), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots", "scale"])
def _rows_kernel(
    slots, rows, scales, host_rows, host_scales,
    row_stride, scale_stride, host_row_stride, host_scale_stride,
    scale, out, width, scaled: tl.constexpr,
    bits: tl.constexpr, group: tl.constexpr, in_host: tl.constexpr, pieces: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """Rows alone, for a lowrank table: out [T, width] = coordinates."""
    token = tl.program_id(0).to(tl.int64)
    row = _decoded_row(
        tl.load(slots + token), rows, scales, host_rows, host_scales,
        row_stride, scale_stride, host_row_stride, host_scale_stride,
        width, bits, group, in_host, pieces, chunk,
    )  # fmt: skip
    if scaled:
        row *= tl.load(scale + token)
    columns = tl.arange(0, pieces)[:, None] * chunk + tl.arange(0, chunk)[None, :]
    tl.store(out + token * width + columns, row, mask=columns < width)


@triton.jit
def _rms_norm_kernel(x, weight, eps, out, stride, width, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    row = tl.load(x + token * stride + columns, mask=columns < width, other=0).to(tl.float32)
    tl.store(out + token * width + columns, _norm(row, weight, columns, width, eps), mask=columns < width)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["tokens"])
def _lookup_kernel(tokens, slot_map, host_map, slots, missed, count, in_host: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0) * block + tl.arange(0, block)
    inside = index < count
    token = tl.load(tokens + index, mask=inside, other=0)
    slot = tl.load(slot_map + token, mask=inside, other=0).to(tl.int64)
    absent = slot < 0
    if in_host:
        record = tl.load(host_map + token, mask=inside & absent, other=0).to(tl.int64)
        slot = tl.where(absent, -1 - record, slot)
        absent = absent & (record < 0)
    tl.store(slots + index, tl.where(absent, 0, slot), mask=inside)
    tl.store(missed + index, absent, mask=inside)


def add_rows_triton(
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
    """`add_rows` in one kernel; with a factor in three: coordinates, torch's product, norm."""
    if data.stride(1) != 1 or stream.stride(1) != 1 or (host is not None and host.stride(1) != 1):
        raise ValueError("the last dimension of data, stream and host must be contiguous")
    if host is not None and data.is_cuda and not host.is_pinned():
        raise ValueError("host must be pinned memory: a kernel reads it where it lies")
    tokens = len(slots)
    width = stream.shape[1] if factor is None else factor.shape[0]
    arena, host_arena = (
        _pointers(a, offset, width, values, group_size) for a in (data, data if host is None else host)
    )
    (rows, scales), (host_rows, host_scales) = arena, host_arena
    sources = (slots.contiguous(), rows, scales, host_rows, host_scales)
    strides = tuple(tensor.stride(0) for tensor in sources[1:])
    pieces, chunk = tile(width, group_size)
    layout = {"bits": BITS[values], "group": group_size or 1, "in_host": host is not None, "pieces": pieces}
    options = {**layout, "chunk": chunk, "num_warps": warps(pieces * chunk), "scaled": scale is not None}
    scales_of_rows = norm_weight if scale is None else scale.contiguous()  # of which a kernel without scales reads none
    if factor is not None:
        coordinates = stream.new_empty((tokens, width))
        if tokens:
            _rows_kernel[(tokens,)](*sources, *strides, scales_of_rows, coordinates, width, **options)
        total = torch.addmm(stream, coordinates, factor)
        return total, rms_norm_triton(total, norm_weight, eps)
    total, normed = torch.empty_like(stream, memory_format=torch.contiguous_format), stream.new_empty(stream.shape)
    if tokens:
        _add_rows_kernel[(tokens,)](
            *sources, *strides, scales_of_rows, stream, norm_weight, eps, total, normed, stream.stride(0), width,
            **options,
        )  # fmt: skip
    return total, normed


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm`, one row a program."""
    if x.stride(1) != 1:
        raise ValueError("the last dimension of x must be contiguous")
    out = x.new_empty(x.shape)
    block = triton.next_power_of_2(x.shape[1])
    if len(x):
        _rms_norm_kernel[(len(x),)](x, weight, eps, out, x.stride(0), x.shape[1], block=block, num_warps=warps(block))
    return out


def lookup_slots_triton(tokens: Tensor, slot_map: Tensor, host_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """`lookup_slots` in one kernel; in torch it is up to eight."""
    slots, missed = torch.empty_like(tokens), tokens.new_empty(tokens.shape, dtype=torch.bool)
    if len(tokens):
        _lookup_kernel[(triton.cdiv(len(tokens), 128),)](
            tokens.contiguous(),
            slot_map,
            slot_map if host_map is None else host_map,
            slots,
            missed,
            len(tokens),
            in_host=host_map is not None,
            block=128,
        )
    return slots, missed


def tile(width: int, group_size: int | None) -> tuple[int, int]:
    """(pieces, values of a piece), powers of two that cover a row; no piece lies across two groups."""
    block = triton.next_power_of_2(width)
    chunk = block if group_size is None else min(group_size & -group_size, block)
    return triton.next_power_of_2(triton.cdiv(width, chunk)), chunk


def warps(values: int) -> int:
    """How many warps share a row of so many values."""
    return min(max(values // VALUES_PER_WARP, 1), 16)


def _pointers(data: Tensor, offset: int, width: int, values: str, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Row of slot 0 as its kernel loads it, and its scales; strides are from slot to slot."""
    end = offset + width * BITS[values] // 8
    rows = data[:, offset:end].view(_LOADED_AS[values])
    return rows, rows if group_size is None else data[:, end : end + 2 * (width // group_size)].view(torch.int16)
