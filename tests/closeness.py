"""How far a kernel's result may lie from float64's."""

import torch
from torch import Tensor

# Half a unit in the last place. Triton's interpreter truncates to bfloat16 where hardware rounds, hence a whole one.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(ROUNDING)


def check(found: Tensor, expected: Tensor, size: Tensor | float, dtype: torch.dtype, roundings: float = 2) -> None:
    """found equals the float64 `expected` within `roundings` roundings to `dtype` of numbers as large as `size`."""
    unit = ROUNDING[dtype] * (2 if dtype == torch.bfloat16 and not found.is_cuda else 1)
    error = (found.double().cpu() - expected).abs()
    bound = roundings * unit * size + 1e-6
    assert (error <= bound).all(), f"off by {(error / bound).max():.2f} times the bound"


def in_wider_rows(x: Tensor) -> Tensor:
    """x [n, width], strided: behind each row lie numbers that would show if they were read."""
    whole = torch.full((len(x), 2 * x.shape[1] + 8), torch.nan, dtype=x.dtype)
    whole[:, : x.shape[1]] = x
    return whole[:, : x.shape[1]]
