"""Which implementation of a kernel runs."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tolkernels.cpu import library


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernel rather than to its torch twin."""
    return device.type == "cuda" and triton_installed()


def use_compiled(x: Tensor) -> bool:
    """Whether `x` goes to the compiled CPU kernels (cpu/*.c), which compute in float32, rather than to the twin."""
    return x.is_cpu and x.dtype == torch.float32 and library() is not None
