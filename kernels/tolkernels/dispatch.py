"""Which implementation of a kernel runs."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def triton_installed() -> bool:
    return find_spec("triton") is not None


def use_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to the Triton kernel rather than to its torch twin."""
    return device.type == "cuda" and triton_installed()
