"""The Triton kernel of `tolkernels.gather`; import it only where Triton is installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A row is a few KiB; one program per token and kilo-element keeps every load coalesced and fills a GPU from one
# decode step of a large model on. Chosen by reasoning, not yet by measurement.
BLOCK = 1024
_BITS = {"bf16": 16, "int8": 8, "int4": 4}
_LOADED_AS = {"bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}


@triton.jit
def _gather_kernel(
    rows,  # row of slot 0: bf16, int8, or uint8 with two values each
    scales,  # its scales, bf16; unused for bf16 rows
    slots,
    residual,  # unused unless `add`
    out,
    row_stride,  # from slot to slot, in elements of rows
    scale_stride,
    residual_stride,
    width,
    bits: tl.constexpr,
    group: tl.constexpr,
    add: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    slot = tl.load(slots + token)
    if bits == 4:
        pair = tl.load(rows + slot * row_stride + columns // 2, mask=inside, other=0).to(tl.int32)
        value = ((((pair >> ((columns % 2) * 4)) & 15) ^ 8) - 8).to(tl.float32)
    else:
        value = tl.load(rows + slot * row_stride + columns, mask=inside, other=0).to(tl.float32)
    if bits != 16:
        value *= tl.load(scales + slot * scale_stride + columns // group, mask=inside, other=0).to(tl.float32)
    # A row is rounded to the stream's dtype first, as in torch; float32 in between is what torch does for 16-bit sums.
    value = value.to(out.dtype.element_ty)
    if add:
        stream = tl.load(residual + token * residual_stride + columns, mask=inside, other=0)
        value = (stream.to(tl.float32) + value.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * width + columns, value, mask=inside)


def gather_rows_triton(
    data: Tensor,
    slots: Tensor,
    residual: Tensor,
    *,
    offset: int,
    values: str,
    group_size: int | None,
    factor: Tensor | None = None,
) -> Tensor:
    """`gather_rows` with one kernel for the rows: no intermediate copy of their bytes."""
    if data.stride(1) != 1 or residual.stride(1) != 1:
        raise ValueError("the last dimension of data and residual must be contiguous")
    tokens = len(slots)
    width = residual.shape[1] if factor is None else factor.shape[0]
    out = torch.empty((tokens, width), dtype=residual.dtype, device=residual.device)
    end = offset + width * _BITS[values] // 8
    rows = data[:, offset:end].view(_LOADED_AS[values])
    scales = data[:, end : end + 2 * (width // group_size)].view(torch.bfloat16) if group_size is not None else rows
    if tokens:
        _gather_kernel[(tokens, triton.cdiv(width, BLOCK))](
            rows,
            scales,
            slots.contiguous(),
            residual,
            out,
            rows.stride(0),
            scales.stride(0),
            residual.stride(0),
            width,
            bits=_BITS[values],
            group=group_size or 1,
            add=factor is None,
            block=BLOCK,
        )
    return out if factor is None else torch.addmm(residual, out, factor)
