"""The Triton kernels of `tolkernels.linear` on CUDA; import it only where Triton is installed.

Weights are held as rows: 16-bit floats [N, K], int8 [N, K] with float32 scales [N], or uint8 [N, K/2], two values to a
byte with the low half first, with bfloat16 scales [N, K/32]. A decode step reads each weight once and is bound by that,
so it is decoded in registers. With more tokens the arithmetic counts, so rows are decoded in pieces for torch's
product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tolkernels.formats import INT4_GROUP

# Up to so many tokens a weight is decoded where it is used. Decoding for torch costs an int8 weight's bytes five times
# (read one, write two, read two), and a tile of 64 tokens is the largest whose sums leave registers to decode with.
MAX_TOKENS = 64
# For one token: outputs and inputs that a program takes at once, 4 KiB of int8. The smallest matrix of the 1B shape
# (2,048 x 2,048) is then 512 programs, four on each of an H100's 132 multiprocessors.
VECTOR_ROWS, VECTOR_SPAN = 4, 1024
# For several: (outputs, inputs, stages of the pipeline) of a program. With 16 outputs that matrix is 128 programs, and
# one on each multiprocessor then keeps 12 KiB of weights in flight. Matrices above WIDE outputs have programs enough
# with 64, which read the tokens less often. All of these by reasoning and by what compiles without spilling
# (benchmarks/compile_kernels.py), not yet by measurement.
NARROW, NARROW_MANY, WIDE = (16, 256, 4), (16, 128, 3), (64, 128, 3)
WIDE_OUTPUTS = 16_384
# Decoded rows at once: they stay in the second-level cache of large GPUs between being written and being read.
PIECE_BYTES = 32 << 20


@triton.jit
def _decoded(
    values, scales, row, first, outputs, inputs,
    bits: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Rows `row` [rows], inputs first .. first + span, as float32 [rows, span]; int8 without its scale. 0 outside."""
    there = (row < outputs)[:, None]
    if bits != 4:
        column = first + tl.arange(0, span)[None, :]
        raw = tl.load(values + row[:, None] * inputs + column, mask=there & (column < inputs), other=0)
        return raw.to(tl.float32)
    column = first // 2 + tl.arange(0, span // 2)[None, :]
    pair = tl.load(values + row[:, None] * (inputs // 2) + column, mask=there & (column < inputs // 2), other=0)
    pair = pair.to(tl.int32)
    integers = tl.interleave(((pair & 15) ^ 8) - 8, ((pair >> 4) ^ 8) - 8).to(tl.float32)
    of_group = first // group + tl.arange(0, span // group)[None, :]
    scale = tl.load(
        scales + row[:, None] * (inputs // group) + of_group, mask=there & (of_group < inputs // group), other=0
    )
    scaled = tl.reshape(integers, [rows, span // group, group]) * scale.to(tl.float32)[:, :, None]
    return tl.reshape(scaled, [rows, span])


@triton.jit
def _vector_kernel(
    x, values, scales, residual, out, outputs, inputs,  # of one token: x [K], residual and out [N]
    bits: tl.constexpr, group: tl.constexpr, add: tl.constexpr, rows: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    products = tl.zeros([rows, span], tl.float32)
    for first in range(0, inputs, span):
        column = first + tl.arange(0, span)
        part = tl.load(x + column, mask=column < inputs, other=0).to(tl.float32)
        products += part[None, :] * _decoded(values, scales, row, first, outputs, inputs, bits, group, rows, span)
    total = tl.sum(products, axis=1)
    inside = row < outputs
    if bits == 8:
        total *= tl.load(scales + row, mask=inside, other=0)
    if add:
        total += tl.load(residual + row, mask=inside, other=0).to(tl.float32)
    tl.store(out + row, total, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _matrix_kernel(
    x, values, scales, residual, out, tokens, outputs, inputs, x_stride, residual_stride,
    bits: tl.constexpr, group: tl.constexpr, add: tl.constexpr,
    block: tl.constexpr, rows: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """At most `block` tokens times some rows. int8 values are exact in 16 bits, scaled int4 values are rounded."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    token = tl.arange(0, block)[:, None]
    total = tl.zeros([block, rows], tl.float32)
    for first in range(0, inputs, span):
        column = first + tl.arange(0, span)[None, :]
        part = tl.load(x + token * x_stride + column, mask=(token < tokens) & (column < inputs), other=0)
        weight = _decoded(values, scales, row, first, outputs, inputs, bits, group, rows, span)
        total = tl.dot(part, tl.trans(weight.to(part.dtype)), total, input_precision="ieee")
    inside = (token < tokens) & (row < outputs)[None, :]
    if bits == 8:
        total *= tl.load(scales + row, mask=row < outputs, other=0)[None, :]
    if add:
        old = tl.load(residual + token * residual_stride + row[None, :], mask=inside, other=0)
        total += old.to(tl.float32)
    tl.store(out + token * outputs + row[None, :], total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["ids"])
def _decode_rows_kernel(
    ids, values, scales, out, outputs, inputs,  # ids [n], or unused unless `pick`: then rows 0 .. n of values
    bits: tl.constexpr, group: tl.constexpr, pick: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + index) if pick else index
    first = tl.program_id(1) * span
    # As a tile of one row.
    found = _decoded(values, scales, row + tl.arange(0, 1), first, outputs, inputs, bits, group, 1, span)
    if bits == 8:
        found *= tl.load(scales + row)
    column = first + tl.arange(0, span)[None, :]
    tl.store(out + index * inputs + column, found, mask=column < inputs)


def vector_linear(x: Tensor, values: Tensor, scales: Tensor | None, residual: Tensor | None) -> Tensor:
    """One token, x [1, K], times the weight's transpose, plus residual [1, N]: [1, N] of x's dtype, in one kernel."""
    _check(x, residual)
    outputs, inputs = len(values), x.shape[1]
    out = x.new_empty((1, outputs))
    _vector_kernel[(triton.cdiv(outputs, VECTOR_ROWS),)](
        x,
        values,
        values if scales is None else scales,
        out if residual is None else residual,
        out,
        outputs,
        inputs,
        bits=_bits(values),
        group=INT4_GROUP,
        add=residual is not None,
        rows=VECTOR_ROWS,
        span=VECTOR_SPAN,
    )
    return out


def quantised_linear(x: Tensor, values: Tensor, scales: Tensor, residual: Tensor | None) -> Tensor:
    """x [T, K] times the weight's transpose, plus residual [T, N] of x's dtype: [T, N] of x's dtype; sums in float32.

    Which kernel runs follows from T and the GPU, so a CUDA graph of a batch size always holds the same.
    """
    _check(x, residual)
    tokens, outputs, inputs = len(x), len(values), x.shape[1]
    if tokens == 1:
        return vector_linear(x, values, scales, residual)
    if tokens > MAX_TOKENS or not _has_matrix_units(x.device):
        return _through_torch(x, values, scales, residual)
    out = x.new_empty((tokens, outputs))
    if not tokens:
        return out
    added = out if residual is None else residual
    block = max(16, triton.next_power_of_2(tokens))
    rows, span, stages = WIDE if outputs >= WIDE_OUTPUTS else NARROW if block == 16 else NARROW_MANY
    _matrix_kernel[(triton.cdiv(outputs, rows),)](
        x,
        values,
        scales,
        added,
        out,
        tokens,
        outputs,
        inputs,
        x.stride(0),
        added.stride(0),
        bits=_bits(values),
        group=INT4_GROUP,
        add=residual is not None,
        block=block,
        rows=rows,
        span=span,
        num_stages=stages,
    )
    return out


def quantised_rows(values: Tensor, scales: Tensor, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
    """Rows `ids` [n] int64, or all, decoded: [n, K] of `dtype`."""
    bits = _bits(values)
    inputs = values.shape[1] * 8 // bits
    count = len(values) if ids is None else len(ids)
    out = torch.empty((count, inputs), dtype=dtype, device=values.device)
    if count:
        _decode_rows_kernel[(count, triton.cdiv(inputs, VECTOR_SPAN))](
            values if ids is None else ids.contiguous(),
            values,
            scales,
            out,
            len(values),
            inputs,
            bits=bits,
            group=INT4_GROUP,
            pick=ids is not None,
            span=VECTOR_SPAN,
        )
    return out


def _through_torch(x: Tensor, values: Tensor, scales: Tensor, residual: Tensor | None) -> Tensor:
    """`quantised_linear` with the weight decoded to x's dtype, some rows at a time."""
    out = x.new_empty((len(x), len(values)))
    step = max(PIECE_BYTES // (x.shape[1] * x.element_size()), 1)
    for start in range(0, len(values), step):
        piece = slice(start, start + step)
        weight = quantised_rows(values[piece], scales[piece], x.dtype).T
        if residual is None:
            torch.mm(x, weight, out=out[:, piece])
        else:
            torch.addmm(residual[:, piece], x, weight, out=out[:, piece])
    return out


def _has_matrix_units(device: torch.device) -> bool:
    """Whether Triton's products of tiles run on them: it knows those of compute capability 8.0 and later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _check(x: Tensor, residual: Tensor | None) -> None:
    if x.stride(1) != 1 or (residual is not None and residual.stride(1) != 1):
        raise ValueError("the last dimension of x and residual must be contiguous")


def _bits(values: Tensor) -> int:
    return {torch.uint8: 4, torch.int8: 8}.get(values.dtype, 16)
