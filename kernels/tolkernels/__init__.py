"""GPU kernels of tolserve, each with a torch twin of the same signature.

Call them by the names in this package: `dispatch` takes the Triton kernel on CUDA where Triton is installed, the twin
everywhere else.
"""

from tolkernels.gather import gather_rows

__all__ = ["gather_rows"]
