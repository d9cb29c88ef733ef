"""The compiled CPU kernels: `cpu/*.c`, built with the package where there is a C compiler (setup.py).

Functions take raw pointers, sizes, and last the number of threads to use, which is torch's:

    lib = library()
    if lib is not None:
        lib.tk_something(ctypes.c_void_p(x.data_ptr()), len(x), torch.get_num_threads())

ctypes lets go of Python's lock during a call. A caller declares `argtypes` of what it calls, once, and checks shapes,
dtypes and contiguity before: C cannot.
"""

import ctypes
import logging
import platform
import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from torch import Tensor  # torch loads the OpenMP runtime that the kernels look for

log = logging.getLogger(__name__)

_INTERFACE = 3  # cpu/isa.h's


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None where they are not built or this processor lacks AVX2: torch does the work then.

    They are linked against no OpenMP runtime: the symbols are found in the one that torch has loaded for everybody, so
    that there is one pool of threads. The reason for a None is logged, once.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        log.warning("the CPU kernels are for Linux on x86-64: torch runs instead, slower")
        return None
    built = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(f"_cpu{suffix}")).exists()]
    if not built:
        log.warning("the CPU kernels are not built: torch runs instead, slower. Install a C compiler and reinstall")
        return None
    try:
        found = ctypes.CDLL(str(built[0]))
    except OSError as error:
        log.warning("the CPU kernels do not load: torch runs instead, slower. %s", error)
        return None
    if not hasattr(found, "tk_interface") or found.tk_interface() != _INTERFACE:
        log.warning("the CPU kernels are of another version: torch runs instead, slower. Reinstall to build them anew")
        return None
    if not found.tk_isa():
        log.warning("this processor has no AVX2: torch runs instead of the CPU kernels")
        return None
    return found


def compiled() -> ctypes.CDLL:
    """The kernels, for who has asked `library()`. Raises RuntimeError where there are none."""
    found = library()
    if found is None:
        raise RuntimeError("the CPU kernels are not built: ask library() first")
    return found


@cache
def isa() -> int:
    """The machine's level of instructions, as cpu/isa.h numbers them."""
    return int(compiled().tk_isa())


def address(tensor: Tensor) -> int:
    """Where a contiguous tensor begins in RAM. Raises ValueError for another."""
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"a contiguous tensor in RAM is needed, got strides {tensor.stride()} on {tensor.device}")
    return tensor.data_ptr()
