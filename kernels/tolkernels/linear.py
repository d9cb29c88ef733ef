"""Linear maps whose weights are held as 32, 16, 8 or 4 bits: attention, output head, and base and flex FFNs.

A weight is held either as `rows`, in the matrix' own order, or on the CPU as the `panels` that the compiled kernels
read (linear_cpu.py). Quantised values are rounded once, from the matrix, and computed with as float32:

    int8   symmetric; one float32 scale per row, its largest magnitude / 127
    int4   values -8 to 7 in groups of 32 along K; scale = the group's value of largest magnitude / -8, as bfloat16
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tolkernels import linear_cpu
from tolkernels.dispatch import use_triton
from tolkernels.formats import DTYPES, INT4_GROUP, Encoding

Layout = Literal["rows", "panels"]

# Rows that are quantised or moved into panels at once, so that loading needs little memory beside the weights: the
# widest matrix of the paper's shapes (8,192) takes 64 MiB as float32.
_ROWS_AT_ONCE = 2048
# Without a kernel for them: a piece of 2,048 inputs is 2 MiB as float32, which a core's L2 cache holds.
_ROWS_DECODED = 256


@dataclass(frozen=True)
class Weight:
    """A matrix [N, K] as a kernel reads it. Made by `make_weight`; what is in `data` and `scales` is the kernels' own.

    As rows: data [N, K] of the encoding's dtype, int8 for "int8", and for "int4" uint8 [N, K/2], the low half first,
    two's complement; scales [N] float32 or [N, K/32] bfloat16. As panels: see linear_cpu.
    """

    shape: tuple[int, int]
    encoding: Encoding
    layout: Layout
    data: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and padding included."""
        return self.data.nbytes + (self.scales.nbytes if self.scales is not None else 0)


def fast_on_cpu(encoding: Encoding) -> bool:
    """Whether this machine's CPU reads such weights at full speed: the compiled kernels do, torch only float32."""
    return linear_cpu.available() or encoding == "float32"


def make_weight(matrix: Tensor, encoding: Encoding) -> Weight:
    """A matrix [N, K] of any float dtype as a weight on its device.

    Raises ValueError for an unknown encoding, an empty or odd-sized matrix (K must be even, and for "int4" a multiple
    of 32), and for values that are not finite where they are to be quantised.
    """
    on_cpu = matrix.device.type == "cpu"
    return hold(matrix, encoding, "panels" if on_cpu and linear_cpu.available() else "rows")


def hold(matrix: Tensor, encoding: Encoding, layout: Layout) -> Weight:
    """`make_weight` in a given layout."""
    _check_matrix(matrix, encoding)
    outputs, inputs = matrix.shape
    empty, fill = (linear_cpu.empty, linear_cpu.fill) if layout == "panels" else (_empty_rows, _fill_rows)
    data, scales = empty(outputs, inputs, encoding, matrix.device)
    for start in range(0, outputs, _ROWS_AT_ONCE):
        values, factors = _quantise(matrix[start : start + _ROWS_AT_ONCE], encoding)
        fill(data, scales, start, values, factors, encoding)
    return Weight((outputs, inputs), encoding, layout, data, scales)


def linear(x: Tensor, weight: Weight, residual: Tensor | None = None) -> Tensor:
    """x [T, K] times the weight's transpose, plus `residual` [T, N] of x's dtype if given: [T, N] of x's dtype.

    The compiled CPU kernels compute in float32. With 8 and 4 bit weights they round a token's activations to 16-bit
    integers, which moves an output by at most the token's largest magnitude / 65,534 times the row's sum of magnitudes;
    a token with a NaN or an infinity gets no finite number there. A token's result depends neither on the other tokens
    nor on the number of threads. On CUDA sums are float32 too, but int4 values times their scales are rounded to x's
    dtype unless T is 1.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check_call(x, weight, residual)
    if weight.layout == "panels":
        add = residual.float() if residual is not None else None
        out = linear_cpu.linear(x.float(), weight.data, weight.scales, weight.encoding, weight.shape[0], add)
        return out.to(x.dtype)
    if not use_triton(x.device):
        return linear_torch(x, weight, residual)
    from tolkernels.linear_triton import quantised_linear, vector_linear

    if weight.scales is not None:
        return quantised_linear(x, weight.data, weight.scales, residual)
    if len(x) == 1 and residual is not None:  # torch's own product would need a second kernel for the sum
        return vector_linear(x, weight.data, None, residual)
    return linear_torch(x, weight, residual)


def linear_argmax(x: Tensor, weight: Weight) -> Tensor:
    """linear(x, weight).argmax(-1), [T] int64: of equal outputs the first, and a NaN counts as the largest.

    The compiled CPU kernels find it while they compute, and write no outputs. Raises what `linear` does.
    """
    if weight.layout != "panels" or x.dtype != torch.float32:
        return linear(x, weight).argmax(-1)
    _check_call(x, weight, None)
    return linear_cpu.argmax(x, weight.data, weight.scales, weight.encoding, weight.shape[0])


def linear_torch(x: Tensor, weight: Weight, residual: Tensor | None = None) -> Tensor:
    """The twin: `linear` of a weight held as rows, in torch, on any device. What is not of x's dtype is decoded first.

    torch's own ways to read 16 or 8 bits on the CPU were measured and not taken (benchmarks/linear.py): they round the
    activations to 8 bits by the batch's largest, lose range, or are slower than float32.
    """
    if weight.data.dtype == x.dtype:
        out = F.linear(x, weight.data)
    else:
        pieces = range(0, weight.shape[0], _ROWS_DECODED)
        out = torch.cat([F.linear(x, _rows(weight, slice(n, n + _ROWS_DECODED)).to(x.dtype)) for n in pieces], dim=1)
    return out if residual is None else out + residual


def embedding_rows(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [T] int64 of the weight as [T, K] of `dtype`: a head that is tied to the embedding serves as both.

    The values are those that `linear` computes with. An id outside the matrix is an IndexError on the CPU.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids must be [T] int64, got {list(ids.shape)} {ids.dtype}")
    # Asked on the CPU alone: a GPU would have to be waited for.
    if not ids.is_cuda and len(ids) and not -1 < int(ids.min()) <= int(ids.max()) < weight.shape[0]:
        raise IndexError(f"ids must lie in 0 to {weight.shape[0] - 1}")
    if weight.layout == "panels":
        values, scales = linear_cpu.rows(ids, weight.data, weight.scales, weight.encoding)
        return _scaled(values, scales, weight.encoding).to(dtype)
    if weight.scales is not None and use_triton(ids.device):
        from tolkernels.linear_triton import quantised_rows

        return quantised_rows(weight.data, weight.scales, dtype, ids)
    return _rows(weight, ids).to(dtype)


def _quantise(matrix: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor | None]:
    """Values [n, K] of the encoding, "int4" as int8 one to a byte, and scales as in `Weight`."""
    if encoding in DTYPES:
        return matrix.to(DTYPES[encoding]), None
    matrix = matrix.float()
    if not matrix.isfinite().all():
        raise ValueError(f"the matrix has values that are not finite: {encoding} cannot hold them")
    if encoding == "int8":
        scales = matrix.abs().amax(1) / 127
        return _divided(matrix, scales.unsqueeze(1)).clamp_(-127, 127).to(torch.int8), scales
    groups = matrix.unflatten(1, (-1, INT4_GROUP))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (largest / -8).to(torch.bfloat16)
    return _divided(groups, scales.float()).clamp_(-8, 7).to(torch.int8).flatten(1), scales.squeeze(2)


def _divided(values: Tensor, scales: Tensor) -> Tensor:
    """values / scales, rounded to whole numbers; 0 where the scale is."""
    return (values / scales.masked_fill(scales == 0, 1)).round_()


def _scaled(values: Tensor, scales: Tensor | None, encoding: Encoding) -> Tensor:
    """What `_quantise` made, back as floats [n, K]."""
    if scales is None:
        return values
    if encoding == "int8":
        return values * scales.unsqueeze(1)
    return (values.unflatten(1, (-1, INT4_GROUP)) * scales.float().unsqueeze(2)).flatten(1)


def _empty_rows(outputs: int, inputs: int, encoding: Encoding, device: torch.device) -> tuple[Tensor, Tensor | None]:
    if encoding in DTYPES:
        return torch.empty(outputs, inputs, dtype=DTYPES[encoding], device=device), None
    if encoding == "int8":
        return (
            torch.empty(outputs, inputs, dtype=torch.int8, device=device),
            torch.empty(outputs, device=device),
        )
    return (
        torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device),
        torch.empty(outputs, inputs // INT4_GROUP, dtype=torch.bfloat16, device=device),
    )


def _fill_rows(
    data: Tensor, scales: Tensor | None, start: int, values: Tensor, factors: Tensor | None, encoding: Encoding
) -> None:
    if encoding == "int4":
        pairs = values.view(torch.uint8).unflatten(1, (-1, 2)) & 15
        values = pairs[..., 0] | pairs[..., 1] << 4
    data[start : start + len(values)] = values
    if scales is not None and factors is not None:
        scales[start : start + len(values)] = factors


def _rows(weight: Weight, which: slice | Tensor) -> Tensor:
    """Rows of a weight held as rows: floats [n, K]."""
    values, scales = weight.data[which], weight.scales[which] if weight.scales is not None else None
    if weight.encoding == "int4":
        values = (torch.stack((values & 15, values >> 4), dim=-1).flatten(1) ^ 8).view(torch.int8) - 8
    return _scaled(values, scales, weight.encoding)


def _check_matrix(matrix: Tensor, encoding: Encoding) -> None:
    if encoding not in get_args(Encoding):
        raise ValueError(f"encoding must be one of {', '.join(get_args(Encoding))}, got {encoding!r}")
    if matrix.ndim != 2 or not matrix.is_floating_point() or not matrix.numel():
        raise ValueError(f"matrix must be [N, K] of floats and not empty, got {list(matrix.shape)} {matrix.dtype}")
    multiple = INT4_GROUP if encoding == "int4" else 2
    if matrix.shape[1] % multiple:
        raise ValueError(f"matrix has K = {matrix.shape[1]}: {encoding} needs a multiple of {multiple}")


def _check_call(x: Tensor, weight: Weight, residual: Tensor | None) -> None:
    outputs, inputs = weight.shape
    if x.ndim != 2 or x.shape[1] != inputs or not x.is_floating_point():
        raise ValueError(f"x must be [T, {inputs}] of floats, got {list(x.shape)} {x.dtype}")
    if residual is not None and (residual.shape != (len(x), outputs) or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be [{len(x)}, {outputs}] {x.dtype}, got {list(residual.shape)} {residual.dtype}"
        )
    if any(tensor.device != weight.data.device for tensor in (x, residual) if tensor is not None):
        raise ValueError(f"x and residual must be on {weight.data.device}, where the weight is")
