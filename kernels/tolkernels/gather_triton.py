"""The Triton kernel of `tolkernels.gather`; import it only where Triton is installed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A row is a few KiB; one program per token and kilo-element keeps every load coalesced and fills a GPU from one
# decode step of a large model on. Chosen by reasoning, not yet by measurement.
BLOCK = 1024


@triton.jit
def _gather_kernel(rows, slots, residual, out, slot_stride, residual_stride, width, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    slot = tl.load(slots + token)
    row = tl.load(rows + slot * slot_stride + columns, mask=inside)
    stream = tl.load(residual + token * residual_stride + columns, mask=inside)
    # float32 in between is what torch does for 16-bit sums; the row is rounded to the stream's dtype first, as there.
    total = stream.to(tl.float32) + row.to(stream.dtype).to(tl.float32)
    tl.store(out + token * width + columns, total.to(stream.dtype), mask=inside)


def gather_rows_triton(
    data: Tensor, slots: Tensor, residual: Tensor, *, offset: int, values: str, group_size: int | None
) -> Tensor:
    """`gather_rows` as one kernel: no intermediate copy of the rows."""
    if data.stride(1) != 1 or residual.stride(1) != 1:
        raise ValueError("the last dimension of data and residual must be contiguous")
    tokens, width = residual.shape
    out = torch.empty((tokens, width), dtype=residual.dtype, device=residual.device)
    rows = data[:, offset : offset + 2 * width].view(torch.bfloat16)
    if tokens:
        _gather_kernel[(tokens, triton.cdiv(width, BLOCK))](
            rows,
            slots.contiguous(),
            residual,
            out,
            rows.stride(0),
            residual.stride(0),
            width,
            block=BLOCK,
        )
    return out
