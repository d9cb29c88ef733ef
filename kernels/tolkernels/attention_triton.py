"""The Triton kernels of `tolkernels.attention`; import it only where Triton is installed."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Heads that one program of store_kv rotates: at the 1B shape a token has 96, so 6 programs of 2 KiB.
HEADS_PER_PROGRAM = 16
# Numbers of keys (and of values, and of float32 sums) that one program of decode_attention holds at once: 32 sums a
# thread with 4 warps, and 8 KiB of each in flight at head_dim 64. Heads that share keys need sums for each.
TILE, TILE_GROUPED = 4096, 8192
# Programs that a decode step is split into where sequences and heads alone are fewer: four of 4 warps on each of an
# H100's 132 multiprocessors. Reasoning, not yet a measurement.
PROGRAMS = 512
MAX_SPLITS = 64
LOG2_E = math.log2(math.e)
# Below every score, and finite, so that differences of two such numbers are numbers.
LOWEST = tl.constexpr(-1e30)


# What differs from step to step is no reason to compile anew: a second spent in the middle of serving.
@triton.jit(do_not_specialize_on_alignment=["places"])
def _store_kv_kernel(
    qkv, cos, sin, places, keys, values, q,
    qkv_stride, heads, kv_heads,  # qkv with a stride; cos, sin, q and the cache are contiguous
    half: tl.constexpr, half_block: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: rotated unless they are values, and stored where they belong."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block + tl.arange(0, block)[:, None]
    column = tl.arange(0, half_block)[None, :]
    whole = column < half
    inside = whole & (head < heads + 2 * kv_heads)
    source = qkv + token * qkv_stride + head * (2 * half) + column
    first = tl.load(source, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0).to(tl.float32)
    turn = inside & (head < heads + kv_heads)
    angle = token * (2 * half) + column
    cos1, cos2 = tl.load(cos + angle, mask=whole, other=1), tl.load(cos + angle + half, mask=whole, other=1)
    sin1, sin2 = tl.load(sin + angle, mask=whole, other=0), tl.load(sin + angle + half, mask=whole, other=0)
    left = tl.where(turn, first * cos1 - second * sin1, first)
    right = tl.where(turn, second * cos2 + first * sin2, second)
    to_q = q + (token * heads + head) * (2 * half) + column
    is_q = whole & (head < heads)
    tl.store(to_q, left, mask=is_q)
    tl.store(to_q + half, right, mask=is_q)
    place = tl.load(places + token) * kv_heads
    to_keys = keys + (place + head - heads) * (2 * half) + column
    is_k = turn & (head >= heads)
    tl.store(to_keys, left, mask=is_k)
    tl.store(to_keys + half, right, mask=is_k)
    to_values = values + (place + head - heads - kv_heads) * (2 * half) + column
    is_v = inside & (head >= heads + kv_heads)
    tl.store(to_values, left, mask=is_v)
    tl.store(to_values + half, right, mask=is_v)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "lengths"])
def _attend_kernel(
    q, keys, values, tables, lengths, out, peaks, sums,  # all contiguous but q and tables
    q_stride, q_head_stride, table_stride, kv_heads, block_size, scale,
    group: tl.constexpr, group_block: tl.constexpr, size: tl.constexpr, size_block: tl.constexpr, tile: tl.constexpr,
    whole: tl.constexpr,
):  # fmt: skip
    """One sequence's heads of one kv head over a part of its positions.

    Each of the tile's positions keeps a softmax of its own (peak, sum, weighted values), over every tile-th position:
    the loop then has no reduction across threads but a score's own, and all are merged once at the end.
    """
    row, kv_head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    length = tl.load(lengths + row)
    part = tl.cdiv(tl.cdiv(length, tile), splits) * tile
    start, end = split * part, tl.minimum((split + 1) * part, length)
    # Everything is [heads of the group, positions of the tile, head_dim].
    head = tl.arange(0, group_block)[:, None, None]
    step = tl.arange(0, tile)[None, :, None]
    column = tl.arange(0, size_block)[None, None, :]
    own = (head < group) & (column < size)
    query = tl.load(q + row * q_stride + (kv_head * group + head) * q_head_stride + column, mask=own, other=0)
    query = query.to(tl.float32) * scale  # in powers of two: scale holds log2(e)
    peak = tl.full([group_block, tile, 1], LOWEST, tl.float32)
    total = tl.zeros([group_block, tile, 1], tl.float32)
    mixed = tl.zeros([group_block, tile, size_block], tl.float32)
    for first in range(start, end, tile):
        position = first + step
        inside = position < end
        block = tl.load(tables + row * table_stride + position // block_size, mask=inside, other=0).to(tl.int64)
        place = ((block * block_size + position % block_size) * kv_heads + kv_head) * size + column
        key = tl.load(keys + place, mask=inside & (column < size), other=0).to(tl.float32)
        value = tl.load(values + place, mask=inside & (column < size), other=0).to(tl.float32)
        score = tl.where(inside, tl.sum(query * key, axis=2, keep_dims=True), float("-inf"))
        higher = tl.maximum(peak, score)
        shrink, weight = tl.exp2(peak - higher), tl.exp2(score - higher)
        total = total * shrink + weight
        mixed = mixed * shrink + weight * value
        peak = higher
    top = tl.max(peak, axis=1, keep_dims=True)
    share = tl.exp2(peak - top)
    total = tl.sum(total * share, axis=1, keep_dims=True)
    mixed = tl.sum(mixed * share, axis=1, keep_dims=True)
    index = (row * kv_heads + kv_head) * group + head
    if whole:
        tl.store(out + index * size + column, mixed / total, mask=own)
    else:
        index = index * splits + split
        tl.store(out + index * size + column, mixed, mask=own)
        tl.store(peaks + index, top, mask=head < group)
        tl.store(sums + index, total, mask=head < group)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    mixed, peaks, sums, out, splits, size: tl.constexpr, size_block: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """One head's parts put together. A part without positions has the lowest peak and a sum of 0."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, block)[:, None]
    column = tl.arange(0, size_block)[None, :]
    peak = tl.load(peaks + head * splits + part, mask=part < splits, other=LOWEST)
    share = tl.exp2(peak - tl.max(peak, axis=0, keep_dims=True))
    sums_of_parts = tl.load(sums + head * splits + part, mask=part < splits, other=0)
    total = tl.sum(sums_of_parts * share, axis=0, keep_dims=True)
    inside = (part < splits) & (column < size)
    found = tl.load(mixed + (head * splits + part) * size + column, mask=inside, other=0)
    found = tl.sum(found * share, axis=0, keep_dims=True) / total
    tl.store(out + head * size + column, found, mask=column < size)


def store_kv_triton(qkv: Tensor, cos: Tensor, sin: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`store_kv` in one kernel."""
    if qkv.stride(1) != 1 or not (cos.is_contiguous() and sin.is_contiguous() and places.is_contiguous()):
        raise ValueError("cos, sin, places and the last dimension of qkv must be contiguous")
    kv_heads, size = keys.shape[2:]
    every = qkv.shape[1] // size
    q = qkv.new_empty((len(qkv), every - 2 * kv_heads, size))
    if len(qkv):
        _store_kv_kernel[(len(qkv), triton.cdiv(every, HEADS_PER_PROGRAM))](
            qkv,
            cos,
            sin,
            places,
            keys,
            values,
            q,
            qkv.stride(0),
            q.shape[1],
            kv_heads,
            half=size // 2,
            half_block=triton.next_power_of_2(size // 2),
            block=HEADS_PER_PROGRAM,
            num_warps=2,
        )
    return q


def decode_attention_triton(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """`decode_attention` in one kernel, or two where the context is split."""
    if q.stride(2) != 1 or tables.stride(1) != 1 or not lengths.is_contiguous():
        raise ValueError("lengths and the last dimension of q and tables must be contiguous")
    batch, heads, size = q.shape
    block_size, kv_heads = keys.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not batch:
        return out
    group = heads // kv_heads
    tile, warps = attention_tile(group, size)
    splits = split_count(batch * kv_heads, tables.shape[1] * block_size, tile)
    mixed, peaks, sums = out, out, out  # the latter two unused without a split
    if splits > 1:
        mixed = q.new_empty((batch, heads, splits, size), dtype=torch.float32)
        peaks, sums = mixed.new_empty((2, batch, heads, splits))
    sizes = {"size": size, "size_block": triton.next_power_of_2(size)}
    _attend_kernel[(batch, kv_heads, splits)](
        q,
        keys,
        values,
        tables,
        lengths,
        mixed,
        peaks,
        sums,
        q.stride(0),
        q.stride(1),
        tables.stride(0),
        kv_heads,
        block_size,
        size**-0.5 * LOG2_E,
        group=group,
        group_block=triton.next_power_of_2(group),
        tile=tile,
        whole=splits == 1,
        num_warps=warps,
        **sizes,
    )
    if splits > 1:
        _merge_kernel[(batch * heads,)](mixed, peaks, sums, out, splits, block=MAX_SPLITS, **sizes)
    return out


def attention_tile(group: int, size: int) -> tuple[int, int]:
    """(positions that a program reads at once, its warps) for `group` heads that share keys of `size` numbers."""
    held = triton.next_power_of_2(size) * triton.next_power_of_2(group)
    return (TILE // held, 4) if group == 1 else (max(TILE_GROUPED // held, 4), 8)


def split_count(programs: int, context: int, tile: int) -> int:
    """Parts of a context of at most `context` positions: enough programs, and no part below a tile."""
    return min(triton.cdiv(PROGRAMS, programs), triton.cdiv(context, tile), MAX_SPLITS)
